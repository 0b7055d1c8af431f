"""One suite over every backend of the sampler: real gRPC, a real engine, a trainer that serves."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
import pytest_asyncio
import torch

from rollmesh.api.sampler.v1 import sampler_service_pb2 as pb
from rollmesh.api.sampler.v1.sampler_service_pb2_grpc import (
    SamplerServiceStub,
    add_SamplerServiceServicer_to_server,
)
from rollmesh.client import SamplerClient
from rollmesh.errors import (
    DigestMismatch,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from rollmesh.rpc.channel import channel
from rollmesh.rpc.server import serving
from rollmesh.types import (
    BASE_VERSION,
    AdapterSource,
    PolicySpan,
    SamplingParams,
    join_chunks,
)
from services.sampler.__main__ import pull
from services.sampler.adapters import Adapters
from services.sampler.backends import choose
from services.sampler.cache import cache_folder
from services.sampler.config import SamplerConfig
from services.sampler.engine import Sampler
from services.sampler.servicer import SamplerServicer
from tests.contract.sampler_world import (
    ADAPTER,
    BASE_MODEL,
    EOS,
    MAX_LENGTH,
    NUM_VERSIONS,
    VOCABULARY,
    FakeTrainer,
    World,
    fake_trainer,
    make_world,
)

if TYPE_CHECKING:
    from services.sampler.backends.base import Backend

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [5, 6, 12, 7, 3]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
MAX_QUEUED = 40
MAX_LORAS = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@dataclass
class Running:
    """A sampler that serves, and what is behind it."""

    client: SamplerClient
    stub: SamplerServiceStub
    address: str
    backend: Backend
    trainer: FakeTrainer
    world: World
    name: str
    dead: bool = False

    async def sample(self, source=None, prompt=PROMPT, num_completions=1, params=GREEDY):
        """Whole completions, by index."""
        chunks = [[] for _ in range(num_completions)]
        async for chunk in self.client.sample(source, prompt, num_completions, params):
            chunks[chunk.index].append(chunk)
        return [join_chunks(pieces) for pieces in chunks]

    async def idle(self) -> None:
        """Return once the engine has nothing to do."""
        async with asyncio.timeout(5):
            while (await self.client.get_sampler()).num_running:
                await asyncio.sleep(0.01)
            if self.name == "vllm":
                engine = self.backend._engine
                assert not engine.output_processor.has_unfinished_requests()
                # vLLM's scheduler refuses while any request has a block of the cache.
                while not await engine.reset_prefix_cache():
                    await asyncio.sleep(0.01)


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["transformers", "vllm"], name="sampler"
)
async def running_sampler(request, world, tmp_path_factory):
    config = SamplerConfig.model_validate(
        {
            "base_model": {"name": BASE_MODEL, "path": str(world.model)},
            "backend": request.param,
            "dtype": "float32",
            "num_threads": 1,
            "max_rank": 16,
            "max_loras": MAX_LORAS,
            "max_cpu_loras": 3,
            "kv_cache_memory": "256MiB",
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
            "chunk_tokens": 5,
        }
    )
    environment = dict(os.environ)
    backend = choose(config)
    with cache_folder(config.cache_dir) as folder:
        adapters = Adapters(
            backend, pull, folder, base_model=BASE_MODEL, max_rank=16, max_versions=NUM_VERSIONS
        )
        sampler = Sampler(
            backend,
            adapters,
            base_model=BASE_MODEL,
            max_rank=16,
            max_queued=MAX_QUEUED,
            chunk_tokens=config.chunk_tokens,
            new_seed=lambda: int.from_bytes(os.urandom(7)),
        )
        try:
            await sampler.start()
            async with (
                adapters,
                serving(
                    lambda server: add_SamplerServiceServicer_to_server(
                        SamplerServicer(sampler), server
                    ),
                    services=[],
                ) as running,
                channel(f"127.0.0.1:{running.port}") as opened,
                fake_trainer(world) as trainer,
            ):
                yield Running(
                    SamplerClient(opened),
                    SamplerServiceStub(opened),
                    f"127.0.0.1:{running.port}",
                    backend,
                    trainer,
                    world,
                    request.param,
                )
        finally:
            await backend.stop()
            # vLLM sets variables for its processes.
            os.environ.clear()
            os.environ.update(environment)
    assert not multiprocessing.active_children()
    assert not list(config.cache_dir.iterdir())


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def clean(sampler):
    """Every test finds an idle sampler without adapters, and leaves no work behind."""
    yield
    if sampler.dead:
        return
    await sampler.idle()
    await sampler.client.unload_adapter(ADAPTER)
    sampler.trainer.faults.clear()
    sampler.trainer.pulls.clear()


# --- what is drawn -------------------------------------------------------------------------------


async def test_it_says_what_it_serves(sampler):
    await sampler.client.load_adapter(sampler.trainer.source(1))
    info = await sampler.client.get_sampler()
    assert (info.base_model, info.vocab_size) == (BASE_MODEL, len(VOCABULARY))
    assert (info.max_length, info.max_rank) == (MAX_LENGTH, 16)
    assert (info.backend, info.num_running) == (sampler.name, 0)
    assert info.loaded == (sampler.trainer.source(1, trainer_address=""),)


@pytest.mark.parametrize("version", [None, 0, 1])
async def test_greedy_is_what_transformers_finds_likeliest(sampler, version):
    source = None if version is None else sampler.trainer.source(version)
    [completion] = await sampler.sample(source)
    assert list(completion.token_ids) == sampler.world.greedy(version, PROMPT, 12)
    assert completion.stop_reason == "length"


async def test_all_greedy_completions_are_the_same(sampler):
    completions = await sampler.sample(num_completions=3)
    assert completions == [completions[0]] * 3


@pytest.mark.parametrize("version", [None, 0])
async def test_logprobs_are_those_of_the_policy_itself(sampler, version):
    source = None if version is None else sampler.trainer.source(version)
    params = SamplingParams(temperature=0.6, top_p=0.95, top_k=20, seed=3, max_tokens=30)
    for completion in await sampler.sample(source, num_completions=4, params=params):
        expected = sampler.world.completion_logprobs(version, PROMPT, completion.token_ids)
        assert completion.logprobs == pytest.approx(expected, abs=1e-3)


async def test_each_span_names_the_version_and_its_digest(sampler):
    source = sampler.trainer.source(2)
    [adapted], [base] = await asyncio.gather(sampler.sample(source), sampler.sample())
    assert adapted.spans == (PolicySpan(12, 2, source.digest),)
    assert base.spans == (PolicySpan(12, BASE_VERSION, ""),)


async def test_the_same_seed_draws_the_same_and_another_does_not(sampler):
    def params(seed):
        return SamplingParams(seed=seed, max_tokens=20, ignore_eos=True)

    first, again, other = [
        await sampler.sample(num_completions=3, params=params(seed)) for seed in (7, 7, 8)
    ]
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    # Not even shifted: neighbouring seeds share no stream.
    assert not {c.token_ids for c in first} & {c.token_ids for c in other}


async def test_without_a_seed_each_request_draws_anew(sampler):
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    first, second = [await sampler.sample(params=params) for _ in range(2)]
    assert first[0].token_ids != second[0].token_ids


async def test_completions_of_one_request_differ(sampler):
    params = SamplingParams(seed=1, max_tokens=20, ignore_eos=True)
    completions = await sampler.sample(num_completions=8, params=params)
    assert len({completion.token_ids for completion in completions}) == 8


async def test_top_k_draws_from_the_likeliest_only(sampler):
    params = SamplingParams(top_k=3, seed=5, max_tokens=40, ignore_eos=True)
    for completion in await sampler.sample(num_completions=4, params=params):
        rows = sampler.world.logprobs(None, [*PROMPT, *completion.token_ids])
        allowed = rows[len(PROMPT) - 1 : -1].topk(3).indices
        drawn = torch.tensor(completion.token_ids)[:, None]
        assert (allowed == drawn).any(1).all()
        assert (allowed[:, 0:1] != drawn).any()


async def test_top_p_draws_from_the_smallest_likely_set(sampler):
    params = SamplingParams(top_p=0.4, seed=5, max_tokens=40, ignore_eos=True)
    for completion in await sampler.sample(num_completions=4, params=params):
        rows = sampler.world.logprobs(None, [*PROMPT, *completion.token_ids])
        probs = rows[len(PROMPT) - 1 : -1].exp()
        drawn = probs.gather(1, torch.tensor(completion.token_ids)[:, None])
        likelier = (probs * (probs > drawn)).sum(1)
        assert likelier.max() < 0.4 + 1e-4
        assert (drawn[:, 0] < probs.max(1).values).any()


async def test_a_low_temperature_is_nearly_greedy_and_a_high_one_is_not(sampler):
    expected = tuple(sampler.world.greedy(None, PROMPT, 12))
    drawn = {}
    for temperature in (0.02, 2.0):
        params = SamplingParams(temperature=temperature, seed=2, max_tokens=12, ignore_eos=True)
        drawn[temperature] = (await sampler.sample(params=params))[0].token_ids
    assert drawn[0.02] == expected
    assert drawn[2.0] != expected


# --- why it ends ---------------------------------------------------------------------------------


async def test_the_end_of_sequence_ends_a_completion_and_is_its_last_token(sampler):
    params = SamplingParams(seed=11, max_tokens=60)
    completions = await sampler.sample(num_completions=24, params=params)
    for completion in completions:
        ended = completion.stop_reason == "stop"
        assert completion.token_ids.count(EOS) == ended
        assert (completion.token_ids[-1] == EOS) == ended
        assert ended or len(completion.token_ids) == 60
    assert {completion.stop_reason for completion in completions} == {"stop", "length"}


async def test_the_end_of_sequence_can_be_ignored(sampler):
    params = SamplingParams(seed=11, max_tokens=60, ignore_eos=True)
    completions = await sampler.sample(num_completions=24, params=params)
    assert {len(completion.token_ids) for completion in completions} == {60}
    assert any(EOS in completion.token_ids for completion in completions)


async def test_a_stop_token_ends_a_completion_and_is_its_last_token(sampler):
    greedy = sampler.world.greedy(None, PROMPT, 12)
    params = SamplingParams(
        temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=(greedy[6], greedy[4])
    )
    [completion] = await sampler.sample(params=params)
    first = min(greedy.index(greedy[4]), greedy.index(greedy[6]))
    assert list(completion.token_ids) == greedy[: first + 1]
    assert completion.stop_reason == "stop"


async def test_a_stop_string_ends_a_completion_with_the_tokens_that_make_it_up(sampler):
    greedy = sampler.world.greedy(0, PROMPT, 12)
    stop = "".join(VOCABULARY[token] for token in greedy[7:9])
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=("never", stop))
    [completion] = await sampler.sample(sampler.trainer.source(0), params=params)
    text = "".join(VOCABULARY[token] for token in completion.token_ids)
    assert text.endswith(stop)
    assert text.count(stop) == 1
    assert completion.stop_reason == "stop"
    assert list(completion.token_ids) == greedy[: len(completion.token_ids)]
    assert len(completion.logprobs) == len(completion.token_ids)


async def test_without_max_tokens_a_completion_fills_the_context(sampler):
    params = SamplingParams(temperature=0, ignore_eos=True)
    prompt = [4] * (MAX_LENGTH - 9)
    [completion] = await sampler.sample(prompt=prompt, params=params)
    assert len(completion.token_ids) == 9
    assert completion.stop_reason == "length"


async def test_long_prompts_at_once_are_each_drawn_right(sampler):
    prompts = [[(i + j) % 40 + 2 for j in range(MAX_LENGTH - 10)] for i in range(8)]
    params = SamplingParams(seed=1, max_tokens=4, ignore_eos=True)
    for prompt, [completion] in zip(
        prompts,
        await asyncio.gather(*(sampler.sample(prompt=p, params=params) for p in prompts)),
        strict=True,
    ):
        expected = sampler.world.completion_logprobs(None, prompt, completion.token_ids)
        assert completion.logprobs == pytest.approx(expected, abs=1e-3)


async def test_tokens_are_streamed_while_others_are_drawn(sampler):
    params = SamplingParams(seed=1, max_tokens=23, ignore_eos=True)
    chunks = [chunk async for chunk in sampler.client.sample(None, PROMPT, 2, params)]
    for index in range(2):
        pieces = [chunk for chunk in chunks if chunk.index == index]
        assert len(pieces) > 2
        assert all(len(piece.token_ids) >= 5 for piece in pieces[:-1])
        assert [piece.stop_reason for piece in pieces] == [*[None] * (len(pieces) - 1), "length"]
        assert sum(len(piece.token_ids) for piece in pieces) == 23


# --- adapters ------------------------------------------------------------------------------------


async def test_more_versions_than_slots_and_the_base_model_at_once_are_each_drawn_right(sampler):
    assert NUM_VERSIONS > MAX_LORAS
    versions = [None, *range(NUM_VERSIONS)] * 3
    prompts = [[*PROMPT, 2 + i] for i in range(len(versions))]
    sources = [None if v is None else sampler.trainer.source(v) for v in versions]
    completions = await asyncio.gather(
        *(sampler.sample(s, p) for s, p in zip(sources, prompts, strict=True))
    )
    for version, prompt, [completion] in zip(versions, prompts, completions, strict=True):
        assert list(completion.token_ids) == sampler.world.greedy(version, prompt, 12)
    outputs = [sampler.world.greedy(version, PROMPT, 12) for version in versions[:7]]
    assert len(set(map(tuple, outputs))) == 7  # or the test would show nothing


async def test_a_version_is_pulled_once_however_many_ask(sampler):
    source = sampler.trainer.source(3)
    times = await asyncio.gather(*(sampler.client.load_adapter(source) for _ in range(10)))
    assert sampler.trainer.pulls == [3]
    assert all(each.pull_s > 0 for each in times)
    assert await sampler.client.load_adapter(source) == type(times[0])(0.0, 0.0)
    await sampler.sample(source)
    assert sampler.trainer.pulls == [3]


async def test_a_version_that_is_not_live_is_pulled_by_the_request(sampler):
    await sampler.sample(sampler.trainer.source(4))
    assert sampler.trainer.pulls == [4]
    assert [s.policy_version for s in (await sampler.client.get_sampler()).loaded] == [4]


async def test_an_unloaded_version_is_gone_and_can_be_pulled_again(sampler):
    for version in (0, 1, 2):
        await sampler.client.load_adapter(sampler.trainer.source(version))
    await sampler.client.unload_adapter(ADAPTER, 1)
    assert {s.policy_version for s in (await sampler.client.get_sampler()).loaded} == {0, 2}
    await sampler.client.unload_adapter(ADAPTER)
    await sampler.client.unload_adapter(ADAPTER)
    assert (await sampler.client.get_sampler()).loaded == ()
    [completion] = await sampler.sample(sampler.trainer.source(1))
    assert list(completion.token_ids) == sampler.world.greedy(1, PROMPT, 12)


async def test_a_request_under_way_keeps_its_version(sampler):
    source = sampler.trainer.source(1)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    chunks = sampler.client.sample(source, PROMPT, 1, params)
    received = [await anext(chunks)]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(sampler.client.unload_adapter(ADAPTER))
        tasks.create_task(sampler.sample(sampler.trainer.source(2)))
        received += [chunk async for chunk in chunks]
    completion = join_chunks(received)
    assert list(completion.token_ids) == sampler.world.greedy(1, PROMPT, 60)
    assert completion.spans == (PolicySpan(60, 1, source.digest),)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("torn", Unavailable),
        ("short", DigestMismatch),
        ("long", DigestMismatch),
        ("flipped bit", DigestMismatch),
        ("other trailer", DigestMismatch),
        ("other version", DigestMismatch),
        ("other base model", InvalidRequest),
        ("large rank", InvalidRequest),
        ("not PEFT", FailedPrecondition),
    ],
)
async def test_a_spoilt_transfer_is_refused_and_a_later_one_accepted(sampler, fault, error):
    source = sampler.trainer.source(5)
    sampler.trainer.faults[5] = fault
    with pytest.raises(error):
        await sampler.sample(source)
    assert (await sampler.client.get_sampler()).loaded == ()
    sampler.trainer.faults.clear()
    [completion] = await sampler.sample(source)
    assert list(completion.token_ids) == sampler.world.greedy(5, PROMPT, 12)


async def test_a_version_that_the_trainer_does_not_have_is_not_found(sampler):
    with pytest.raises(NotFound):
        await sampler.client.load_adapter(sampler.trainer.source(0, policy_version=99))


async def test_a_trainer_that_cannot_be_reached_is_unavailable(sampler):
    with pytest.raises(Unavailable):
        await sampler.client.load_adapter(sampler.trainer.source(0, trainer_address="127.0.0.1:1"))


async def test_the_weights_that_are_asked_for_are_checked_against_what_the_trainer_has(sampler):
    with pytest.raises(DigestMismatch):
        await sampler.client.load_adapter(sampler.trainer.source(0, digest="0" * 64))


# --- log-probabilities ---------------------------------------------------------------------------


async def test_logprobs_of_given_tokens_are_those_of_the_policy(sampler):
    token_ids = [(i * 7) % 40 + 2 for i in range(100)]
    versions = [None, 0, 1, None, 2]
    sources = [None if v is None else sampler.trainer.source(v) for v in versions]
    results = await asyncio.gather(
        *(sampler.client.compute_logprobs(source, token_ids) for source in sources)
    )
    for version, source, result in zip(versions, sources, results, strict=True):
        expected = sampler.world.completion_logprobs(version, token_ids[:1], token_ids[1:])
        assert result.logprobs[0] != result.logprobs[0]  # NaN
        assert result.logprobs[1:] == pytest.approx(expected, abs=1e-3)
        wanted = (BASE_VERSION, "") if source is None else (version, source.digest)
        assert result.span == PolicySpan(100, *wanted)


async def test_what_was_sampled_has_the_same_logprobs_when_computed(sampler):
    source = sampler.trainer.source(1)
    [completion] = await sampler.sample(source, params=SamplingParams(seed=4, max_tokens=50))
    result = await sampler.client.compute_logprobs(source, [*PROMPT, *completion.token_ids])
    assert result.logprobs[len(PROMPT) :] == pytest.approx(completion.logprobs, abs=1e-3)


# --- callers that go away ------------------------------------------------------------------------

LONG = SamplingParams(seed=1, max_tokens=500, ignore_eos=True)


async def test_a_cancelled_call_ends_its_work_in_the_engine(sampler):
    chunks = sampler.client.sample(sampler.trainer.source(0), PROMPT, 64, LONG)
    await anext(chunks)
    assert (await sampler.client.get_sampler()).num_running == 64
    await chunks.aclose()
    await sampler.idle()


async def test_a_call_cancelled_while_nobody_reads_ends_its_work_in_the_engine(sampler):
    call = sampler.stub.Sample(
        pb.SampleRequest(prompt_token_ids=PROMPT, num_completions=200, params={"max_tokens": 500})
    )
    await call.read()
    call.cancel()
    await sampler.idle()


async def test_a_deadline_ends_the_work_in_the_engine(sampler):
    request = pb.SampleRequest(
        prompt_token_ids=PROMPT,
        num_completions=64,
        params={"max_tokens": 500, "ignore_eos": True},
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in sampler.stub.Sample(request, timeout=0.3):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await sampler.idle()


async def test_a_client_that_is_gone_ends_its_work_in_the_engine(sampler):
    async with channel(sampler.address) as opened:
        chunks = SamplerClient(opened).sample(None, PROMPT, 64, LONG)
        await anext(chunks)
    with contextlib.suppress(Exception):
        await chunks.aclose()
    await sampler.idle()


async def test_a_request_beyond_the_bound_is_refused_and_the_others_finish(sampler):
    params = SamplingParams(seed=1, max_tokens=40, ignore_eos=True)
    async with asyncio.TaskGroup() as tasks:
        calls = [tasks.create_task(sampler.sample(params=params)) for _ in range(MAX_QUEUED)]
        while (await sampler.client.get_sampler()).num_running < MAX_QUEUED:
            await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await sampler.sample()
    assert caught.value.retry_after_s > 0
    assert {len(call.result()[0].token_ids) for call in calls} == {40}


# --- bad input -----------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "field"),
    [
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
        ({"params": SamplingParams(stop=("",))}, "params.stop"),
        ({"params": SamplingParams(stop=("a",) * 17)}, "params.stop"),
        ({"params": SamplingParams(stop_token_ids=(3, 999))}, "params.stop_token_ids[1]"),
        ({"source": AdapterSource("a", 0, "0" * 64, "h:1")}, "source.adapter"),
        ({"source": AdapterSource("projects/p/adapters/../x", 0, "0" * 64)}, "source.adapter"),
        ({"source": AdapterSource(ADAPTER, -1, "0" * 64, "h:1")}, "source.policy_version"),
        ({"source": AdapterSource(ADAPTER, 0, "../../x", "h:1")}, "source.digest"),
        ({"source": AdapterSource(ADAPTER, 0, "0" * 64)}, "source.trainer_address"),
    ],
)
async def test_bad_input_is_the_callers_error_and_names_the_field(sampler, change, field):
    arguments = {"source": None, "prompt": PROMPT, "num_completions": 1, "params": GREEDY}
    with pytest.raises(InvalidRequest) as caught:
        # Not `sample`, which needs the number of completions to be one.
        async for _ in sampler.client.sample(*(arguments | change).values()):
            pass
    assert caught.value.context["field"] == field
    assert caught.value.context["allowed"]


@pytest.mark.parametrize(
    "token_ids", [[], [3], [3] * MAX_LENGTH, [3, 999]], ids=["none", "one", "too many", "unknown"]
)
async def test_logprobs_of_bad_input_are_the_callers_error(sampler, token_ids):
    with pytest.raises(InvalidRequest):
        await sampler.client.compute_logprobs(None, token_ids)


# --- the end; last, for it kills the engine ------------------------------------------------------


async def test_a_dead_engine_is_noticed_and_fails_every_request(sampler):
    if sampler.name != "vllm":
        pytest.skip("an engine in the sampler's own process dies with it")
    sampler.dead = True
    [engine] = multiprocessing.active_children()
    [worker] = Path(f"/proc/{engine.pid}/task/{engine.pid}/children").read_text().split()
    chunks = sampler.client.sample(None, PROMPT, 64, LONG)
    await anext(chunks)
    os.kill(int(worker), signal.SIGKILL)
    with pytest.raises(Unavailable):
        async for _ in chunks:
            pass
    assert "died" in await sampler.backend.failure()
    for call in (
        sampler.sample(),
        sampler.sample(sampler.trainer.source(0)),
        sampler.client.compute_logprobs(None, PROMPT),
    ):
        with pytest.raises(Unavailable):
            await call
