"""What sampling means, the same on every backend: a real process, real gRPC, real engines.

The reference is transformers' own model without a cache, and the distribution worked out anew in
numpy.
"""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
import pytest_asyncio

from rollmesh.api.sampler.v1 import sampler_service_pb2 as pb
from rollmesh.api.sampler.v1.sampler_service_pb2_grpc import SamplerServiceStub
from rollmesh.client import SamplerClient
from rollmesh.convert import source_to_pb
from rollmesh.errors import InvalidRequest, Unimplemented
from rollmesh.rpc.channel import channel
from rollmesh.types import (
    BASE_VERSION,
    AdapterSource,
    Continuation,
    PolicySpan,
    SamplingParams,
    join_chunks,
)
from tests.contract.sampler_process import sampler_process
from tests.contract.sampler_world import (
    ADAPTER,
    BASE_MODEL,
    EOS,
    MAX_LENGTH,
    VOCABULARY,
    FakeTrainer,
    World,
    fake_trainer,
    make_world,
    trainer_logprobs,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [5, 6, 12, 7, 3]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
EXACT = 1e-4
"""What float32 leaves between two ways of computing a log-probability."""
DIGITS = [VOCABULARY.index(digit) for digit in "0123456789"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@dataclass
class Running:
    """A sampler that serves, and where its adapters come from."""

    client: SamplerClient
    stub: SamplerServiceStub
    trainer: FakeTrainer
    world: World
    name: str
    instance_id: str

    def source(self, version: int | None) -> AdapterSource | None:
        return None if version is None else self.trainer.source(version)

    async def chunks(
        self, version=None, prompt=PROMPT, num_completions=1, params=GREEDY, continuations=()
    ):
        sampled = self.client.sample(
            self.source(version),
            prompt,
            num_completions,
            params,
            project="p",
            continuations=continuations,
        )
        return [chunk async for chunk in sampled]

    async def sample(self, version=None, prompt=PROMPT, num_completions=1, params=GREEDY):
        """Whole completions, by index."""
        chunks = await self.chunks(version, prompt, num_completions, params)
        return [
            join_chunks([chunk for chunk in chunks if chunk.index == index])
            for index in range(num_completions)
        ]

    async def continued(self, version, completions, places, params):
        """`completions` as they are when each was broken off at its place and went on there."""
        begun = [
            Continuation(index, completion.token_ids[:place])
            for index, (completion, place) in enumerate(zip(completions, places, strict=True))
        ]
        chunks = await self.chunks(version, PROMPT, len(begun), params, begun)
        rest = [
            join_chunks([chunk for chunk in chunks if chunk.index == each.index]) for each in begun
        ]
        return [
            replace(
                after,
                token_ids=each.token_ids + after.token_ids,
                logprobs=whole.logprobs[: len(each.token_ids)] + after.logprobs,
            )
            for each, whole, after in zip(begun, completions, rest, strict=True)
        ]

    async def idle(self) -> None:
        """Return once nothing runs or waits."""
        async with asyncio.timeout(20):
            while (info := await self.client.get_sampler()).num_running or info.num_queued:
                await asyncio.sleep(0.01)


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["transformers", "vllm"], name="sampler"
)
async def running_sampler(request, world, tmp_path_factory):
    values = {
        "base_model": {"name": BASE_MODEL, "path": str(world.model)},
        "backend": request.param,
        "dtype": "float32",
        "num_threads": 1,
        "max_rank": 16,
        "max_loras": 2,
        "kv_cache_memory": "256MiB",
        "chunk_tokens": 5,
        "quantum_s": 0.1,
    }
    async with (
        sampler_process(tmp_path_factory.mktemp("sampler"), values) as process,
        channel(process.address) as opened,
        fake_trainer(world) as trainer,
    ):
        client = SamplerClient(opened)
        instance_id = (await client.get_sampler()).instance_id
        yield Running(
            client, SamplerServiceStub(opened), trainer, world, request.param, instance_id
        )


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def clean(sampler):
    """Every test leaves an idle sampler without adapters."""
    yield
    sampler.trainer.faults.clear()
    await sampler.idle()
    await sampler.client.unload_adapter(ADAPTER)
    sampler.trainer.pulls.clear()


# --- the reference -------------------------------------------------------------------------------


def distribution(policy_V: np.ndarray, params: SamplingParams) -> np.ndarray:  # noqa: N803
    """Log-probabilities of what `params` draws from, -inf where it never draws; float64 [V]."""
    logits = policy_V.astype(np.float64)
    for token_id, bias in params.logit_bias:
        logits[token_id] += bias
    logits /= 1.0 if params.temperature is None else params.temperature
    probs = np.exp(logits - logits.max())
    kept = probs >= (params.min_p or 0.0) * probs.max()
    likeliest_first = np.argsort(-probs)
    kept[likeliest_first[params.top_k or len(probs) :]] = False
    probs = np.where(kept, probs, 0.0) / probs[kept].sum()
    total = 0.0
    for token_id in likeliest_first:
        if total >= (params.top_p or 1.0):
            probs[token_id] = 0.0
        total += probs[token_id]
    with np.errstate(divide="ignore"):
        return np.log(probs / probs.sum())


def policy_rows(world: World, version, prompt, completion: Sequence[int]) -> np.ndarray:
    """The policy's own log-probabilities where each of the completion's tokens stands, [T, V]."""
    return world.logprobs(version, [*prompt, *completion])[len(prompt) - 1 : -1].numpy()


def at(rows: np.ndarray, token_ids: Sequence[int]) -> list[float]:
    return rows[np.arange(len(token_ids)), list(token_ids)].tolist()


BIAS = tuple((token_id, 3.0 * (-1) ** token_id) for token_id in range(2, 30))
WAYS = {
    "plain": SamplingParams(),
    "cool": SamplingParams(temperature=0.6),
    "hot": SamplingParams(temperature=1.7),
    "top_k": SamplingParams(top_k=3),
    "top_p": SamplingParams(top_p=0.6),
    "min_p": SamplingParams(min_p=0.1),
    "bias": SamplingParams(logit_bias=BIAS),
    "all": SamplingParams(temperature=1.3, top_k=12, top_p=0.8, min_p=0.05, logit_bias=BIAS),
}
CUTTING = ["top_k", "top_p", "min_p", "all"]


def way(name: str, **changes) -> SamplingParams:
    return replace(WAYS[name], **{"seed": 3, "max_tokens": 24, "ignore_eos": True, **changes})


# --- what is drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [None, 0, 1])
async def test_greedy_is_what_transformers_finds_likeliest(sampler, version):
    [completion] = await sampler.sample(version)
    assert list(completion.token_ids) == sampler.world.greedy(version, PROMPT, 12)
    assert completion.stop_reason == "length"


async def test_all_greedy_completions_are_the_same(sampler):
    completions = await sampler.sample(num_completions=3)
    assert completions == [completions[0]] * 3


async def test_greedy_is_the_likeliest_after_the_bias(sampler):
    params = replace(GREEDY, logit_bias=BIAS)
    [completion] = await sampler.sample(0, params=params)
    rows = policy_rows(sampler.world, 0, PROMPT, completion.token_ids)
    likeliest = [int(distribution(row, replace(params, temperature=1)).argmax()) for row in rows]
    assert list(completion.token_ids) == likeliest
    assert likeliest != sampler.world.greedy(0, PROMPT, 12)
    assert completion.logprobs == pytest.approx(at(rows, likeliest), abs=EXACT)


@pytest.mark.parametrize("version", [None, 1])
@pytest.mark.parametrize("name", WAYS)
async def test_logprobs_of_either_kind_are_those_of_transformers(sampler, name, version):
    drawn = {}
    for kind in ("policy", "sampled"):
        params = way(name, logprobs_kind=kind)
        completions = await sampler.sample(version, num_completions=3, params=params)
        drawn[kind] = [completion.token_ids for completion in completions]
        for completion in completions:
            rows = policy_rows(sampler.world, version, PROMPT, completion.token_ids)
            if kind == "sampled":
                rows = np.array([distribution(row, params) for row in rows])
            assert completion.logprobs == pytest.approx(at(rows, completion.token_ids), abs=EXACT)
    assert drawn["policy"] == drawn["sampled"]


@pytest.mark.parametrize("name", CUTTING)
async def test_what_is_cut_off_is_never_drawn(sampler, name):
    params = way(name, max_tokens=40)
    num_allowed = set()
    for completion in await sampler.sample(num_completions=8, params=params):
        rows = policy_rows(sampler.world, None, PROMPT, completion.token_ids)
        allowed = np.isfinite([distribution(row, params) for row in rows])
        assert all(at(allowed, completion.token_ids))
        num_allowed |= set(allowed.sum(1).tolist())
    assert 1 < max(num_allowed) < len(VOCABULARY)  # or there was nothing to see


@pytest.mark.parametrize("name", ["plain", "cool", "all"])
async def test_tokens_are_drawn_as_often_as_the_distribution_says(sampler, name):
    params = way(name, max_tokens=1)
    completions = await sampler.sample(num_completions=1024, params=params)
    counts = np.bincount([c.token_ids[0] for c in completions], minlength=len(VOCABULARY))
    [row] = policy_rows(sampler.world, None, PROMPT, [0])
    probs = np.exp(distribution(row, params))
    # Five standard deviations, and one for what is rare.
    bounds = 5 * np.sqrt(1024 * probs * (1 - probs)) + 1
    assert (np.abs(counts - 1024 * probs) <= bounds).all()
    assert (counts > 0).sum() > 5


async def test_each_place_of_a_completion_draws_anew(sampler):
    params = way("plain", max_tokens=400)
    [completion] = await sampler.sample(params=params)
    counts = np.bincount(completion.token_ids, minlength=len(VOCABULARY))
    probs = np.exp(policy_rows(sampler.world, None, PROMPT, completion.token_ids))
    bounds = 5 * np.sqrt((probs * (1 - probs)).sum(0)) + 1
    assert (np.abs(counts - probs.sum(0)) <= bounds).all()


async def test_the_logprobs_of_what_is_greedy_are_0_where_they_are_of_what_was_drawn_from(sampler):
    params = replace(GREEDY, logprobs_kind="sampled", logit_bias=BIAS)
    [completion] = await sampler.sample(0, params=params)
    assert completion.logprobs == (0.0,) * 12


async def test_a_bias_of_100_forces_and_of_minus_100_forbids(sampler):
    forced = await sampler.sample(params=way("plain", logit_bias=((17, 100.0),)))
    assert set(forced[0].token_ids) == {17}
    forbidden = dict.fromkeys(range(0, len(VOCABULARY), 2), -100.0)
    params = way("plain", logit_bias=tuple(forbidden.items()))
    for completion in await sampler.sample(num_completions=4, params=params):
        assert not forbidden.keys() & set(completion.token_ids)
    ended = await sampler.sample(params=way("plain", logit_bias=((EOS, 100.0),), ignore_eos=False))
    assert (ended[0].token_ids, ended[0].stop_reason) == ((EOS,), "stop")


@pytest.mark.parametrize("version", [0, 1, 2])
async def test_the_trainer_computes_the_same_logprobs(sampler, version):
    [completion] = await sampler.sample(version, params=way("plain", max_tokens=100))
    expected = trainer_logprobs(sampler.world, version, PROMPT, completion.token_ids, "float32")
    assert completion.logprobs == pytest.approx(expected, abs=EXACT)


async def test_each_span_names_the_version_its_digest_and_the_sampler(sampler):
    [adapted], [base] = await asyncio.gather(sampler.sample(2), sampler.sample())
    digest = sampler.trainer.source(2).digest
    assert adapted.spans == (PolicySpan(12, 2, digest, sampler.instance_id),)
    assert base.spans == (PolicySpan(12, BASE_VERSION, "", sampler.instance_id),)
    assert sampler.instance_id


# --- seeds ---------------------------------------------------------------------------------------


async def test_the_same_seed_draws_the_same_and_another_does_not(sampler):
    first, again, other = [
        await sampler.sample(num_completions=3, params=way("plain", seed=seed))
        for seed in (7, 7, 8)
    ]
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    # Not even shifted: neighbouring seeds share no stream.
    assert not {c.token_ids for c in first} & {c.token_ids for c in other}


async def test_each_completion_has_a_stream_of_its_own_however_many_there_are(sampler):
    eight = await sampler.sample(0, num_completions=8, params=way("plain"))
    assert len({completion.token_ids for completion in eight}) == 8
    four = await sampler.sample(0, num_completions=4, params=way("plain"))
    assert [c.token_ids for c in four] == [c.token_ids for c in eight[:4]]


async def test_a_seed_draws_the_same_beside_others(sampler):
    cases = [(version, way(name)) for version in (None, 0, 1) for name in ("plain", "all")]
    alone = [await sampler.sample(version, params=params) for version, params in cases]
    together = await asyncio.gather(*(sampler.sample(v, params=p) for v, p in cases))
    assert [c.token_ids for [c] in together] == [c.token_ids for [c] in alone]


async def test_another_version_or_prompt_draws_something_else(sampler):
    requests = [(None, PROMPT), (0, PROMPT), (1, PROMPT), (None, PROMPT[1:])]
    drawn = [await sampler.sample(v, prompt, params=way("plain")) for v, prompt in requests]
    assert len({completion.token_ids for [completion] in drawn}) == len(requests)


async def test_without_a_seed_each_request_draws_anew(sampler):
    first, second = [await sampler.sample(params=way("plain", seed=None)) for _ in range(2)]
    assert first[0].token_ids != second[0].token_ids


# --- continuations -------------------------------------------------------------------------------

STOPPING = {
    "end of sequence": {"ignore_eos": False, "max_tokens": 60, "logit_bias": ((EOS, 2.0),)},
    "stop token": {"stop_token_ids": tuple(DIGITS)},
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("plain", {}),
        ("all", {}),
        ("min_p", {"logprobs_kind": "sampled"}),
        ("bias", {"temperature": 0.0}),
        *(("plain", changes) for changes in STOPPING.values()),
    ],
    ids=["plain", "all", "sampled", "greedy", *STOPPING],
)
@pytest.mark.parametrize("version", [None, 1])
async def test_a_continuation_at_any_place_goes_on_as_if_nothing_had_been(
    sampler, version, name, changes
):
    params = way(name, **changes)
    whole = await sampler.sample(version, num_completions=3, params=params)
    for step in range(max(len(completion.token_ids) for completion in whole)):
        # Each at a place of its own, among them the first and the last one.
        places = [(step + 7 * i) % len(c.token_ids) for i, c in enumerate(whole)]
        again = await sampler.continued(version, whole, places, params)
        for before, after in zip(whole, again, strict=True):
            assert after.token_ids == before.token_ids
            assert after.logprobs == pytest.approx(before.logprobs, abs=EXACT)
            assert after.stop_reason == before.stop_reason


async def test_only_what_is_continued_is_drawn(sampler):
    whole = await sampler.sample(num_completions=4, params=way("plain"))
    begun = [Continuation(2, whole[2].token_ids[:5]), Continuation(0)]
    chunks = await sampler.chunks(None, PROMPT, 4, way("plain"), begun)
    assert {chunk.index for chunk in chunks} == {0, 2}
    for index, place in ((2, 5), (0, 0)):
        rest = join_chunks([chunk for chunk in chunks if chunk.index == index])
        assert rest.token_ids == whole[index].token_ids[place:]


async def test_a_stop_string_across_the_border_of_a_continuation_is_found(sampler):
    params = way("plain")
    [free] = await sampler.sample(0, params=params)
    stop = "".join(VOCABULARY[token] for token in free.token_ids[9:14])
    params = replace(params, stop=("never", stop))
    [whole] = await sampler.sample(0, params=params)
    assert whole.token_ids == free.token_ids[:14]
    for place in range(14):
        [again] = await sampler.continued(0, [whole], [place], params)
        assert (again.token_ids, again.stop_reason) == (whole.token_ids, "stop")


# --- why it ends ---------------------------------------------------------------------------------


async def test_the_end_of_sequence_ends_a_completion_and_is_its_last_token(sampler):
    params = way("plain", max_tokens=60, ignore_eos=False)
    completions = await sampler.sample(num_completions=24, params=params)
    for completion in completions:
        ended = completion.stop_reason == "stop"
        assert completion.token_ids.count(EOS) == ended
        assert (completion.token_ids[-1] == EOS) == ended
        assert ended or len(completion.token_ids) == 60
    assert {completion.stop_reason for completion in completions} == {"stop", "length"}


async def test_the_end_of_sequence_can_be_ignored(sampler):
    completions = await sampler.sample(num_completions=24, params=way("plain", max_tokens=60))
    assert {len(completion.token_ids) for completion in completions} == {60}
    assert any(EOS in completion.token_ids for completion in completions)


async def test_a_stop_token_ends_a_completion_and_is_its_last_token(sampler):
    greedy = sampler.world.greedy(None, PROMPT, 12)
    [completion] = await sampler.sample(
        params=replace(GREEDY, stop_token_ids=(greedy[6], greedy[4]))
    )
    first = min(greedy.index(greedy[4]), greedy.index(greedy[6]))
    assert list(completion.token_ids) == greedy[: first + 1]
    assert completion.stop_reason == "stop"


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
async def test_a_stop_string_ends_a_completion_with_the_tokens_that_make_it_up(sampler, num_tokens):
    [free] = await sampler.sample(0, params=way("plain"))
    text = "".join(VOCABULARY[token] for token in free.token_ids)
    stop = "".join(VOCABULARY[token] for token in free.token_ids[7 : 7 + num_tokens])
    [completion] = await sampler.sample(0, params=way("plain", stop=("never", stop)))
    shown = "".join(VOCABULARY[token] for token in completion.token_ids)
    assert shown == text[: text.index(stop) + len(stop)]
    assert completion.stop_reason == "stop"
    assert completion.logprobs == pytest.approx(free.logprobs[: len(completion.token_ids)])


async def test_without_max_tokens_a_completion_fills_the_context(sampler):
    params = SamplingParams(temperature=0, ignore_eos=True)
    [completion] = await sampler.sample(None, [4] * (MAX_LENGTH - 9), params=params)
    assert len(completion.token_ids) == 9
    assert completion.stop_reason == "length"


async def test_long_prompts_at_once_are_each_drawn_right(sampler):
    prompts = [[(i + j) % 40 + 2 for j in range(MAX_LENGTH - 10)] for i in range(8)]
    params = way("plain", max_tokens=4)
    drawn = await asyncio.gather(*(sampler.sample(None, p, params=params) for p in prompts))
    for prompt, [completion] in zip(prompts, drawn, strict=True):
        expected = sampler.world.completion_logprobs(None, prompt, completion.token_ids)
        assert completion.logprobs == pytest.approx(expected, abs=EXACT)


async def test_tokens_are_streamed_while_others_are_drawn(sampler):
    chunks = await sampler.chunks(None, PROMPT, 2, way("plain", max_tokens=23))
    for index in range(2):
        pieces = [chunk for chunk in chunks if chunk.index == index]
        assert len(pieces) > 2
        assert all(len(piece.token_ids) >= 5 for piece in pieces[:-1])
        assert [piece.stop_reason for piece in pieces] == [*[None] * (len(pieces) - 1), "length"]
        assert sum(len(piece.token_ids) for piece in pieces) == 23


# --- log-probabilities of given tokens -----------------------------------------------------------


@pytest.mark.parametrize("version", [None, 1])
@pytest.mark.parametrize("num_top", [0, 3, 20])
async def test_prompt_logprobs_are_those_of_the_policy_itself(sampler, version, num_top):
    prompt = [(i * 7) % 40 + 2 for i in range(60)]
    params = way("all", logprobs_kind="sampled", prompt_logprobs=num_top)
    chunks = await sampler.chunks(version, prompt, 2, params)
    [found] = [chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs]
    expected = sampler.world.completion_logprobs(version, prompt[:1], prompt[1:])
    assert math.isnan(found.logprobs[0])
    assert found.logprobs[1:] == pytest.approx(expected, abs=EXACT)
    top = sampler.world.logprobs(version, prompt)[:-1].topk(num_top)
    assert found.top_token_ids == ((-1,) * num_top, *map(tuple, top.indices.tolist()))
    assert len(found.top_logprobs) == 60
    assert all(map(math.isnan, found.top_logprobs[0]))
    for row, likeliest in zip(found.top_logprobs[1:], top.values.tolist(), strict=True):
        assert row == pytest.approx(likeliest, abs=EXACT)


async def test_asking_for_prompt_logprobs_changes_nothing_else(sampler):
    plain, asked = [
        await sampler.sample(0, num_completions=2, params=way("plain", prompt_logprobs=asked))
        for asked in (None, 2)
    ]
    assert [c.token_ids for c in asked] == [c.token_ids for c in plain]
    assert not any(completion.prompt_logprobs for completion in plain)


@pytest.mark.parametrize("kind", ["policy", "sampled"])
@pytest.mark.parametrize("version", [None, 1])
@pytest.mark.parametrize("name", ["plain", "cool", "bias", "all"])
async def test_the_likeliest_tokens_are_those_of_transformers_and_of_the_same_kind(
    sampler, name, version, kind
):
    num_top = 20
    params = way(name, logprobs_kind=kind, top_logprobs=num_top)
    found = await sampler.sample(version, num_completions=2, params=params)
    bare = await sampler.sample(
        version, num_completions=2, params=replace(params, top_logprobs=None)
    )
    for completion, other in zip(found, bare, strict=True):
        assert completion.token_ids == other.token_ids
        assert completion.logprobs == pytest.approx(other.logprobs, abs=EXACT)
        assert (other.top_token_ids, other.top_logprobs) == ((), ())
        rows = policy_rows(sampler.world, version, PROMPT, completion.token_ids)
        if kind == "sampled":
            rows = np.array([distribution(row, params) for row in rows])
        assert len(completion.top_token_ids) == len(completion.top_logprobs) == len(rows)
        for row, ids, values in zip(
            rows, completion.top_token_ids, completion.top_logprobs, strict=True
        ):
            best = np.sort(row)[::-1][:num_top]
            assert values == pytest.approx(best.tolist(), abs=1e-3)
            assert [each == -1 for each in ids] == [value == -math.inf for value in values]
            real = [each for each in ids if each != -1]
            assert len(set(real)) == len(real)
            assert row[real] == pytest.approx(best[: len(real)].tolist(), abs=1e-3)


@pytest.mark.parametrize("kind", ["policy", "sampled"])
async def test_of_what_is_greedy_only_one_token_can_be_drawn(sampler, kind):
    params = replace(GREEDY, logprobs_kind=kind, top_logprobs=3)
    [completion] = await sampler.sample(0, params=params)
    rows = zip(completion.token_ids, completion.top_token_ids, completion.top_logprobs, strict=True)
    for token, ids, values in rows:
        assert ids[0] == token
        assert ((ids[1:], values) == ((-1, -1), (0, -math.inf, -math.inf))) == (kind == "sampled")


async def test_no_likeliest_and_the_likeliest_of_neighbours_are_kept_apart(sampler):
    numbers = (None, 0, 1, 7)
    found = await asyncio.gather(
        *(
            sampler.sample(0, num_completions=3, params=way("plain", top_logprobs=number))
            for number in numbers
        )
    )
    for number, completions in zip(numbers, found, strict=True):
        assert [c.token_ids for c in completions] == [c.token_ids for c in found[0]]
        for completion in completions:
            widths = [len(row) for row in completion.top_token_ids]
            assert widths == ([] if number is None else [number] * len(completion.token_ids))
            assert [len(row) for row in completion.top_logprobs] == widths


async def test_the_likeliest_go_on_with_a_continuation_and_end_with_a_stop_string(sampler):
    params = way("plain", top_logprobs=3)
    [free] = await sampler.sample(0, params=params)
    stop = "".join(VOCABULARY[token] for token in free.token_ids[9:14])
    params = replace(params, stop=(stop,))
    for place in (0, 1, 7, 12):
        begun = Continuation(0, free.token_ids[:place])
        rest = join_chunks(await sampler.chunks(0, PROMPT, 1, params, [begun]))
        assert rest.token_ids == free.token_ids[place:14]
        assert rest.top_token_ids == free.top_token_ids[place:14]
        for own, other in zip(rest.top_logprobs, free.top_logprobs[place:14], strict=True):
            assert own == pytest.approx(other, abs=EXACT)


async def test_of_a_prompt_of_one_token_there_is_nothing_to_predict(sampler):
    [completion] = await sampler.sample(None, [5], params=replace(GREEDY, prompt_logprobs=2))
    found = completion.prompt_logprobs
    assert (len(found.logprobs), found.top_token_ids) == (1, ((-1, -1),))
    assert math.isnan(found.logprobs[0])


async def test_logprobs_of_given_tokens_are_those_of_the_policy(sampler):
    token_ids = [(i * 7) % 40 + 2 for i in range(100)]
    versions = [None, 0, 1, None, 2]
    results = await asyncio.gather(
        *(
            sampler.client.compute_logprobs(sampler.source(version), token_ids, project="p")
            for version in versions
        )
    )
    for version, result in zip(versions, results, strict=True):
        expected = sampler.world.completion_logprobs(version, token_ids[:1], token_ids[1:])
        assert math.isnan(result.logprobs[0])
        assert result.logprobs[1:] == pytest.approx(expected, abs=EXACT)
        source = sampler.source(version)
        wanted = (BASE_VERSION, "") if source is None else (version, source.digest)
        assert result.span == PolicySpan(100, *wanted, sampler.instance_id)


async def test_what_was_sampled_has_the_same_logprobs_when_computed(sampler):
    [completion] = await sampler.sample(1, params=way("plain", max_tokens=50))
    result = await sampler.client.compute_logprobs(
        sampler.source(1), [*PROMPT, *completion.token_ids], project="p"
    )
    assert result.logprobs[len(PROMPT) :] == pytest.approx(completion.logprobs, abs=EXACT)


# --- constraints ---------------------------------------------------------------------------------

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"enum": [1, 22, 333]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)
CONSTRAINTS = {"json_schema": SCHEMA, "regex": "[0-9]{3}(x|yy)"}


@pytest.fixture
def constrained(sampler):
    if sampler.name != "vllm":
        pytest.skip("this engine cannot constrain")
    return sampler


@pytest.mark.parametrize("field", CONSTRAINTS)
async def test_an_engine_that_cannot_constrain_says_so(sampler, field):
    if sampler.name == "vllm":
        pytest.skip("this engine can")
    with pytest.raises(Unimplemented) as caught:
        await sampler.sample(params=way("plain", **{field: CONSTRAINTS[field]}))
    assert caught.value.context["field"] == f"params.{field}"


def text_of(completion) -> str:
    assert completion.token_ids[-1] == EOS
    return "".join(VOCABULARY[token] for token in completion.token_ids[:-1])


async def test_json_that_a_schema_allows_is_drawn(constrained):
    params = way("plain", json_schema=SCHEMA, max_tokens=300, ignore_eos=False)
    completions = await constrained.sample(0, num_completions=8, params=params)
    found = [json.loads(text_of(completion)) for completion in completions]
    assert all(each.keys() == {"a", "b"} and each["a"] in {1, 22, 333} for each in found)
    assert len({json.dumps(each) for each in found}) > 1


async def test_text_that_a_regex_matches_is_drawn_with_both_kinds_of_logprobs(constrained):
    allowed = [DIGITS, DIGITS, DIGITS, [VOCABULARY.index(letter) for letter in "xy"]]
    for kind in ("policy", "sampled"):
        params = way("plain", regex=CONSTRAINTS["regex"], ignore_eos=False, logprobs_kind=kind)
        for completion in await constrained.sample(0, num_completions=8, params=params):
            text = text_of(completion)
            assert text[:3].isdigit()
            assert text[3:] in {"x", "yy"}
            rows = policy_rows(constrained.world, 0, PROMPT, completion.token_ids)
            expected = at(rows, completion.token_ids)
            if kind == "sampled":
                totals = [
                    np.log(np.exp(r[a]).sum()) for r, a in zip(rows[:4], allowed, strict=False)
                ]
                expected = [p - total for p, total in zip(expected[:4], totals, strict=True)]
                # After the letter that was drawn, there is one way to go on.
                expected += [0.0] * (len(completion.token_ids) - 4)
            assert completion.logprobs == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("field", CONSTRAINTS)
async def test_a_constrained_completion_goes_on_at_any_place(constrained, field):
    params = way("plain", max_tokens=300, ignore_eos=False, **{field: CONSTRAINTS[field]})
    [whole] = await constrained.sample(0, params=params)
    for place in range(len(whole.token_ids)):
        [again] = await constrained.continued(0, [whole], [place], params)
        assert (again.token_ids, again.stop_reason) == (whole.token_ids, "stop")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("json_schema", "{"),
        ("json_schema", '{"type": "no such type"}'),
        ("json_schema", "3"),
        ("json_schema", '{"$ref": "#/definitions/missing"}'),
        ("regex", "(["),
        ("regex", "a{3,1}"),
        ("regex", "(?=x)y"),
    ],
)
async def test_a_constraint_that_is_none_is_the_callers_error_and_the_engine_lives(
    constrained, field, value
):
    with pytest.raises(InvalidRequest) as caught:
        await constrained.sample(params=way("plain", **{field: value}))
    assert caught.value.context["field"] == f"params.{field}"
    [completion] = await constrained.sample()
    assert list(completion.token_ids) == constrained.world.greedy(None, PROMPT, 12)


# --- bad input -----------------------------------------------------------------------------------

NAN = float("nan")
BAD = [
    ({"prompt": []}, "prompt_token_ids"),
    ({"prompt": [3] * MAX_LENGTH}, "prompt_token_ids"),
    ({"prompt": [3, len(VOCABULARY)]}, "prompt_token_ids[1]"),
    ({"prompt": [-1]}, "prompt_token_ids[0]"),
    ({"num_completions": 0}, "num_completions"),
    ({"num_completions": 1025}, "num_completions"),
    ({"params": SamplingParams(max_tokens=0)}, "params.max_tokens"),
    ({"params": SamplingParams(temperature=-0.1)}, "params.temperature"),
    ({"params": SamplingParams(temperature=NAN)}, "params.temperature"),
    ({"params": SamplingParams(temperature=2.1)}, "params.temperature"),
    ({"params": SamplingParams(top_k=0)}, "params.top_k"),
    ({"params": SamplingParams(top_p=0)}, "params.top_p"),
    ({"params": SamplingParams(top_p=1.1)}, "params.top_p"),
    ({"params": SamplingParams(top_p=NAN)}, "params.top_p"),
    ({"params": SamplingParams(min_p=-0.1)}, "params.min_p"),
    ({"params": SamplingParams(min_p=1.0)}, "params.min_p"),
    ({"params": SamplingParams(min_p=NAN)}, "params.min_p"),
    ({"params": SamplingParams(logit_bias=((999, 1.0),))}, "params.logit_bias"),
    ({"params": SamplingParams(logit_bias=((-1, 1.0),))}, "params.logit_bias"),
    ({"params": SamplingParams(logit_bias=((3, 100.5),))}, "params.logit_bias"),
    ({"params": SamplingParams(logit_bias=((3, NAN),))}, "params.logit_bias"),
    ({"params": SamplingParams(logit_bias=((3, -math.inf),))}, "params.logit_bias"),
    ({"params": SamplingParams(prompt_logprobs=-1)}, "params.prompt_logprobs"),
    ({"params": SamplingParams(prompt_logprobs=21)}, "params.prompt_logprobs"),
    ({"params": SamplingParams(top_logprobs=-1)}, "params.top_logprobs"),
    ({"params": SamplingParams(top_logprobs=21)}, "params.top_logprobs"),
    ({"params": SamplingParams(stop=("",))}, "params.stop"),
    ({"params": SamplingParams(stop=("a",) * 17)}, "params.stop"),
    ({"params": SamplingParams(stop_token_ids=(3, 999))}, "params.stop_token_ids[1]"),
    ({"source": AdapterSource("a", 0, "0" * 64, "h:1")}, "source.adapter"),
    ({"source": AdapterSource("projects/p/adapters/../x", 0, "0" * 64)}, "source.adapter"),
    ({"source": AdapterSource(ADAPTER, -1, "0" * 64, "h:1")}, "source.policy_version"),
    ({"source": AdapterSource(ADAPTER, 0, "../../x", "h:1")}, "source.digest"),
    ({"source": AdapterSource(ADAPTER, 0, "0" * 64)}, "source.trainer_address"),
    ({"project": ""}, "project"),
    ({"project": "../q"}, "project"),
    ({"continuations": [Continuation(1, (3,))]}, "continuations"),
    ({"continuations": [Continuation(-1, (3,))]}, "continuations"),
    ({"continuations": [Continuation(0, (3,)), Continuation(0, (4,))]}, "continuations"),
    ({"continuations": [Continuation(0, (3, 999))]}, "continuations"),
    ({"continuations": [Continuation(0, (3,) * 12)]}, "continuations"),
]


async def refused(sampler, change) -> InvalidRequest:
    arguments = {
        "source": None,
        "prompt_token_ids": PROMPT,
        "num_completions": 1,
        "params": GREEDY,
        "project": "p",
        **change,
    }
    arguments["prompt_token_ids"] = arguments.pop("prompt", PROMPT)
    with pytest.raises(InvalidRequest) as caught:
        async for _ in sampler.client.sample(**arguments):
            pass
    return caught.value


@pytest.mark.parametrize(("change", "field"), BAD)
async def test_bad_input_is_the_callers_error_and_names_the_field(sampler, change, field):
    error = await refused(sampler, change)
    # Which of several it is, is named too.
    assert error.context["field"].startswith(field)
    assert error.context["allowed"]


async def test_a_kind_of_logprobs_that_does_not_exist_is_the_callers_error(sampler):
    request = pb.SampleRequest(
        prompt_token_ids=PROMPT, num_completions=1, params={"logprobs_kind": 7}, project="p"
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await sampler.stub.Sample(request).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "params.logprobs_kind" in caught.value.details()


async def test_the_bad_input_of_others_disturbs_nobody(sampler):
    params = way("plain", max_tokens=400)
    [alone] = await sampler.sample(params=params)
    chunks = sampler.client.sample(None, PROMPT, 1, params, project="p")
    received = [await anext(chunks)]
    for change, _ in BAD:
        await refused(sampler, change)
    received += [chunk async for chunk in chunks]
    assert join_chunks(received).token_ids == alone.token_ids


@pytest.mark.parametrize(
    "token_ids", [[], [3], [3] * MAX_LENGTH, [3, 999]], ids=["none", "one", "too many", "unknown"]
)
async def test_logprobs_of_bad_input_are_the_callers_error(sampler, token_ids):
    with pytest.raises(InvalidRequest) as caught:
        await sampler.client.compute_logprobs(None, token_ids, project="p")
    assert caught.value.context["field"].startswith("token_ids")


# --- signs of life -------------------------------------------------------------------------------


async def test_a_request_that_waits_says_that_it_lives(sampler):
    sampler.trainer.released.clear()
    sampler.trainer.faults[3] = "held"
    call = sampler.stub.Sample(
        pb.SampleRequest(
            source=source_to_pb(sampler.trainer.source(3)),
            prompt_token_ids=PROMPT,
            num_completions=1,
            params={"temperature": 0, "max_tokens": 12, "ignore_eos": True},
            project="p",
        )
    )
    signs = [await call.read() for _ in range(3)]
    assert not any(sign.HasField("chunk") for sign in signs)
    sampler.trainer.released.set()
    token_ids = []
    while (message := await call.read()) is not grpc.aio.EOF:
        token_ids += message.chunk.token_ids
    assert token_ids == sampler.world.greedy(3, PROMPT, 12)


async def test_a_cancelled_request_is_not_drawn_any_further(sampler):
    params = way("plain", max_tokens=500)
    chunks = sampler.client.sample(sampler.source(0), PROMPT, 64, params, project="p")
    await anext(chunks)
    assert (await sampler.client.get_sampler()).num_running == 64
    await chunks.aclose()
    await sampler.idle()
