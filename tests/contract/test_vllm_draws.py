"""The real vLLM: what is drawn, from which distribution, and how a completion goes on elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace

import pytest
import pytest_asyncio
import torch

from rollmesh.errors import InvalidRequest, Unavailable
from rollmesh.types import Continuation
from services.sampler.backends.base import Draw, LoadedAdapter
from services.sampler.config import SamplerConfig
from tests.contract.sampler_world import BASE_MODEL, EOS, VOCABULARY, World, make_world

vllm = pytest.importorskip("services.sampler.backends.vllm")

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [5, 6, 12, 7, 3]
MAX_TOKENS = 24
DRAW = Draw(
    max_tokens=MAX_TOKENS,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    seed=2**61 + 7,
    stop=(),
    stop_token_ids=(),
    ignore_eos=True,
)
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"enum": [1, 22, 333]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)
VARIANTS = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "bias": {"logit_bias": ((9, 4.0), (10, 4.0), (11, -100.0))},
    "greedy, bias": {"temperature": 0.0, "logit_bias": ((9, 50.0),)},
    "all of them": {
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.01,
        "logit_bias": ((9, 2.0),),
    },
    "JSON": {"json_schema": SCHEMA, "max_tokens": 60},
    "regex": {"regex": "(ab|c[0-9]){3,}="},
}


@dataclass
class Drawn:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: str | None = None
    prompt_logprobs: object = None
    top_token_ids: list[list[int]] = field(default_factory=list)
    top_logprobs: list[list[float]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(VOCABULARY[token] for token in self.token_ids if token != EOS)


@dataclass
class Engine:
    backend: object
    world: World

    async def sample(
        self, completions=1, version=0, prompt=PROMPT, project="p", **changes
    ) -> dict[int, Drawn]:
        """By index; `completions`: how many, or which."""
        if isinstance(completions, int):
            completions = [Continuation(index) for index in range(completions)]
        found: defaultdict[int, Drawn] = defaultdict(Drawn)
        deltas = self.backend.sample(
            self.adapter(version), prompt, completions, replace(DRAW, **changes), project=project
        )
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                one = found[delta.index]
                assert one.stop_reason is None
                assert len(delta.token_ids) == len(delta.logprobs)
                one.token_ids += delta.token_ids
                one.logprobs += delta.logprobs
                one.stop_reason = delta.stop_reason
                one.prompt_logprobs = delta.prompt_logprobs or one.prompt_logprobs
                one.top_token_ids += delta.top_token_ids
                one.top_logprobs += delta.top_logprobs
        assert all(one.stop_reason for one in found.values())
        return dict(found)

    def adapter(self, version):
        if version is None:
            return None
        folder = self.world.folder / str(version)
        digest = self.world.export(version)[2]
        config = (folder / "adapter_config.json").read_text()
        return LoadedAdapter(version + 1, f"a@{version}", folder, digest, config)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(world):
    config = SamplerConfig.model_validate(
        {
            "base_model": {"name": BASE_MODEL, "path": str(world.model)},
            "dtype": "float32",
            "num_threads": 1,
            "max_rank": 16,
            "max_loras": 2,
            "max_num_seqs": 64,
            # Few blocks: many completions put each other off.
            "kv_cache_memory": "8MiB",
            "chunk_tokens": 3,
        }
    )
    backend = vllm.VllmBackend(config)
    try:
        assert (await backend.start()).kv_tokens == 8192
        running = Engine(backend, world)
        for version in (0, 1):
            await backend.load(running.adapter(version))
        yield running
    finally:
        await backend.stop()


def distribution(world, version, tokens, draw: Draw) -> torch.Tensor:
    """Log-probabilities after each token, from transformers' logits."""
    logits = world.logprobs(version, tokens).double()
    for token, bias in draw.logit_bias:
        logits[:, token] += bias
    if draw.temperature == 0:
        return torch.where(logits == logits.amax(-1, keepdim=True), 0.0, -math.inf)
    logits = logits / draw.temperature
    probs = logits.softmax(-1)
    logits[probs < draw.min_p * probs.amax(-1, keepdim=True)] = -math.inf
    if draw.top_k:
        logits[logits < logits.topk(draw.top_k).values[:, -1:]] = -math.inf
    probs, order = logits.softmax(-1).sort(-1, descending=True)
    cut = probs.cumsum(-1) - probs >= draw.top_p
    logits[cut.gather(1, order.argsort(-1))] = -math.inf
    return logits.log_softmax(-1)


@pytest.mark.parametrize("version", [0, None])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in {"JSON", "regex"}])
async def test_both_kinds_of_logprobs_are_of_the_distributions_that_they_name(
    engine, world, variant, version
):
    changes = VARIANTS[variant]
    policy, sampled = await asyncio.gather(
        *(
            engine.sample(4, version, logprobs_kind=kind, **changes)
            for kind in ("policy", "sampled")
        )
    )
    for index in range(4):
        tokens = policy[index].token_ids
        assert sampled[index].token_ids == tokens
        assert policy[index].stop_reason == "length"
        expected = world.completion_logprobs(version, PROMPT, tokens)
        assert policy[index].logprobs == pytest.approx(expected, abs=1e-4)
        rows = distribution(world, version, [*PROMPT, *tokens], replace(DRAW, **changes))
        drawn_from = rows[len(PROMPT) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])
        assert sampled[index].logprobs == pytest.approx(drawn_from[:, 0].tolist(), abs=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
async def test_a_completion_goes_on_at_any_border_as_it_would_have(engine, variant):
    changes = VARIANTS[variant]
    whole = await engine.sample(3, **changes)
    length = len(whole[1].token_ids)
    borders = sorted({1, 2, 3, 7, length // 2, length - 1} - set(range(length, 99)))
    for border in borders:
        had = [Continuation(index, tuple(whole[index].token_ids[:border])) for index in (2, 1)]
        rest = await engine.sample([had[0], had[1], Continuation(0)], **changes)
        for index in (1, 2):
            assert rest[index].token_ids == whole[index].token_ids[border:]
            assert rest[index].logprobs == pytest.approx(whole[index].logprobs[border:], abs=1e-4)
            assert rest[index].stop_reason == whole[index].stop_reason
        assert rest[0].token_ids == whole[0].token_ids


@pytest.mark.parametrize("variant", ["JSON", "greedy, bias", "top_k"])
async def test_the_likeliest_go_on_at_any_border_too(engine, variant):
    changes = {**VARIANTS[variant], "top_logprobs": 4, "logprobs_kind": "sampled"}
    whole = (await engine.sample(1, **changes))[0]
    assert len(whole.top_token_ids) == len(whole.token_ids)
    for border in (1, 2, 7, len(whole.token_ids) - 1):
        had = Continuation(0, tuple(whole.token_ids[:border]))
        rest = (await engine.sample([had], **changes))[0]
        assert rest.top_token_ids == whole.top_token_ids[border:]
        for own, other in zip(rest.top_logprobs, whole.top_logprobs[border:], strict=True):
            assert own == pytest.approx(other, abs=1e-3)


async def test_stop_strings_are_found_across_the_border(engine):
    whole = (await engine.sample())[0]
    stop = whole.text[6:10]
    end = whole.text.index(stop) + len(stop)
    for border in range(end):
        had = Continuation(0, tuple(whole.token_ids[:border]))
        found = (await engine.sample([had], stop=("not there", stop)))[0]
        assert found.token_ids == whole.token_ids[border:end]
        assert found.stop_reason == "stop"


async def test_draws_do_not_depend_on_the_batch_or_on_how_completions_are_asked_for(engine):
    alone = [(await engine.sample([Continuation(index)]))[index] for index in range(3)]
    together, *_ = await asyncio.gather(
        engine.sample(3), *(engine.sample(4, 1, seed=seed) for seed in range(10))
    )
    assert [together[index].token_ids for index in range(3)] == [one.token_ids for one in alone]
    assert len({tuple(one.token_ids) for one in alone}) == 3


async def test_completions_that_were_put_off_are_the_same(engine):
    """More than fits: vLLM throws some out and computes them again, prompts in several steps."""
    prompts = [[2 + (i * step) % 40 for i in range(300)] for step in range(1, 41)]
    crowded = await asyncio.gather(
        *(engine.sample(1, step % 2, prompt, max_tokens=60) for step, prompt in enumerate(prompts))
    )
    for step in (0, 9, 20, 39):
        alone = await engine.sample(1, step % 2, prompts[step], max_tokens=60)
        assert crowded[step][0].token_ids == alone[0].token_ids


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
@pytest.mark.parametrize("version", [1, None])
async def test_prompt_logprobs_are_the_policys(engine, world, num_top, version):
    prompt = [2 + (i * 7) % 40 for i in range(200)]
    # So that most of the prompt is in the prefix cache.
    await engine.sample(1, version, prompt)
    busy = [engine.sample(2, version, prompt, seed=seed) for seed in range(3)]
    found, *others = await asyncio.gather(
        engine.sample(3, version, prompt, prompt_logprobs=num_top, temperature=1.5), *busy
    )
    top = next(one.prompt_logprobs for one in found.values() if one.prompt_logprobs)
    assert sum(one.prompt_logprobs is not None for one in found.values()) == 1
    assert not any(one.prompt_logprobs for other in others for one in other.values())
    rows = world.logprobs(version, prompt)[:-1]
    expected = rows.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert math.isnan(top.logprobs[0])
    assert top.logprobs[1:] == pytest.approx(expected.tolist(), abs=1e-4)
    assert top.top_token_ids[0] == (-1,) * num_top
    assert all(map(math.isnan, top.top_logprobs[0]))
    assert len(top.top_token_ids) == len(top.top_logprobs) == len(prompt)
    best = rows.topk(num_top).values.tolist()
    for position, row in enumerate(best):
        assert top.top_logprobs[position + 1] == pytest.approx(row, abs=1e-4)
        ids = torch.tensor(top.top_token_ids[position + 1], dtype=torch.long)
        assert rows[position][ids].tolist() == pytest.approx(row, abs=1e-4)


async def test_logprobs_of_sequences_are_the_policys(engine, world):
    sequence = [2 + (i * 7) % 40 for i in range(100)]
    for project in ("p", "", "q"):
        found = await engine.backend.compute_logprobs(engine.adapter(0), sequence, project=project)
        expected = world.completion_logprobs(0, sequence[:1], sequence[1:])
        assert math.isnan(found[0])
        assert found[1:] == pytest.approx(expected, abs=1e-4)


async def test_tokens_that_end_a_completion_are_part_of_it(engine, world):
    whole = (await engine.sample())[0].token_ids
    stopped = (await engine.sample(stop_token_ids=(whole[5],)))[0]
    end = whole.index(whole[5]) + 1
    assert (stopped.token_ids, stopped.stop_reason) == (whole[:end], "stop")
    bias = ((EOS, 6.0),)
    ended = (await engine.sample(ignore_eos=False, logit_bias=bias))[0]
    assert (ended.token_ids[-1], ended.stop_reason) == (EOS, "stop")
    going_on = (await engine.sample(ignore_eos=True, logit_bias=bias))[0]
    assert going_on.token_ids[: len(ended.token_ids)] == ended.token_ids
    assert (len(going_on.token_ids), going_on.stop_reason) == (MAX_TOKENS, "length")


@pytest.mark.parametrize("kind", ["policy", "sampled"])
async def test_constrained_text_is_of_its_form(engine, world, kind):
    plain = engine.sample(2, seed=3)
    found, unconstrained = await asyncio.gather(
        engine.sample(4, json_schema=SCHEMA, max_tokens=200, logprobs_kind=kind), plain
    )
    for one in found.values():
        assert one.stop_reason == "stop"
        assert json.loads(one.text).keys() == {"a", "b"}
        assert json.loads(one.text)["a"] in {1, 22, 333}
        policy = world.completion_logprobs(0, PROMPT, one.token_ids)
        if kind == "policy":
            assert one.logprobs == pytest.approx(policy, abs=1e-4)
        else:
            # Where the form leaves no choice, the token was certain.
            assert one.logprobs[0] == pytest.approx(0, abs=1e-6) or one.token_ids[0] != 43
            assert sum(one.logprobs) > sum(policy) + 5
    again = await engine.sample(2, seed=3)
    assert [again[i].token_ids for i in (0, 1)] == [unconstrained[i].token_ids for i in (0, 1)]
    matched = await engine.sample(4, regex="(ab|c[0-9])+=", max_tokens=200)
    assert all(re.fullmatch("(ab|c[0-9])+=", one.text) for one in matched.values())


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("json_schema", "{"),
        ("json_schema", ""),
        ("json_schema", '{"type": 3}'),
        ("json_schema", '{"type": "object", "properties": 3}'),
        ("json_schema", '{"$ref": "#/nowhere"}'),
        ("regex", "(("),
        ("regex", "a{5,2}"),
        ("regex", "\x00"),
        ("regex", "[z-a]"),
    ],
)
async def test_a_bad_constraint_is_the_callers_mistake_and_nobody_elses(engine, field, bad):
    other = asyncio.ensure_future(engine.sample(1, max_tokens=100))
    with pytest.raises(InvalidRequest) as caught:
        await engine.sample(**{field: bad})
    assert caught.value.context["field"] == f"params.{field}"
    assert len((await other)[0].token_ids) == 100


async def test_a_constrained_completion_that_comes_out_otherwise_is_not_continued(engine):
    had = Continuation(0, tuple(VOCABULARY.index(letter) for letter in "abab"))
    whole = (await engine.sample(regex="(ab|c[0-9]){9}="))[0]
    assert whole.token_ids[:4] != list(had.token_ids)
    with pytest.raises(Unavailable, match="cannot be continued"):
        await engine.sample([had], regex="(ab|c[0-9]){9}=")


async def test_what_is_closed_leaves_the_engine(engine):
    output = engine.backend._engine.output_processor
    had = (await engine.sample())[0].token_ids[:5]
    for completions in (
        [Continuation(0), Continuation(1)],
        [Continuation(0, tuple(had)), Continuation(1)],
    ):
        deltas = engine.backend.sample(
            engine.adapter(0), PROMPT, completions, replace(DRAW, max_tokens=400), project="p"
        )
        await anext(deltas)
        assert output.has_unfinished_requests()
        await deltas.aclose()
        assert not output.has_unfinished_requests()
        async with asyncio.timeout(10):
            # vLLM's scheduler refuses while any request has a block of the cache.
            while not await engine.backend._engine.reset_prefix_cache():
                await asyncio.sleep(0.01)
