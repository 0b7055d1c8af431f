"""One suite over every backend of the sampler: real gRPC, a real engine, a trainer that serves."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import pytest
import pytest_asyncio

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
    PolicySpan,
    SamplingParams,
    join_chunks,
)
from services.sampler.__main__ import trainer_parts
from services.sampler.adapters import Adapters
from services.sampler.backends import choose
from services.sampler.cache import cache_folder
from services.sampler.config import SamplerConfig
from services.sampler.engine import Sampler
from services.sampler.servicer import SamplerServicer
from services.sampler.slots import Slots
from services.sampler.transfer import Sources
from tests.contract.sampler_world import (
    ADAPTER,
    BASE_MODEL,
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
MAX_QUEUED = 48
MAX_NUM_SEQS = 64
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

    def chunks(self, source=None, prompt=PROMPT, num_completions=1, params=GREEDY, *, project="p"):
        return self.client.sample(source, prompt, num_completions, params, project=project)

    async def sample(self, *request, **options):
        """Whole completions, by index."""
        chunks = [chunk async for chunk in self.chunks(*request, **options)]
        return [
            join_chunks([chunk for chunk in chunks if chunk.index == index])
            for index in sorted({chunk.index for chunk in chunks})
        ]

    async def idle(self) -> None:
        """Return once the engine has nothing to do."""
        async with asyncio.timeout(20):
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
            "kv_cache_memory": "256MiB",
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
            "chunk_tokens": 5,
            "max_queued": MAX_QUEUED,
            "max_num_seqs": MAX_NUM_SEQS,
            "quantum_s": 0.1,
        }
    )
    environment = dict(os.environ)
    backend = choose(config)
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(cache_folder(config.cache_dir, config.max_cache))
        # vLLM sets variables for its processes.
        stack.callback(lambda: (os.environ.clear(), os.environ.update(environment)))
        stack.push_async_callback(backend.stop)
        slots = Slots(
            backend,
            quantum_s=config.quantum_s,
            kv_overcommit=config.kv_overcommit,
            max_completions=config.max_num_seqs,
        )
        adapters = Adapters(
            Sources(trainer_parts, None, pauses_s=(0.0, 0.0)).pull,
            folder,
            release=slots.forget,
            base_model=BASE_MODEL,
            max_rank=config.max_rank,
            max_versions=NUM_VERSIONS,
            max_bytes=config.max_cache,
        )
        await stack.enter_async_context(adapters)
        await stack.enter_async_context(slots)
        sampler = Sampler(
            backend,
            adapters,
            slots,
            instance_id="this one",
            base_model=BASE_MODEL,
            max_rank=config.max_rank,
            max_queued=config.max_queued,
            chunk_tokens=config.chunk_tokens,
            new_seed=lambda: int.from_bytes(os.urandom(7)),
            clock=time.monotonic,
        )
        await sampler.start()
        running = await stack.enter_async_context(
            serving(
                lambda server: add_SamplerServiceServicer_to_server(
                    SamplerServicer(sampler), server
                ),
                services=[],
            )
        )
        address = f"127.0.0.1:{running.port}"
        opened = await stack.enter_async_context(channel(address))
        trainer = await stack.enter_async_context(fake_trainer(world))
        yield Running(
            SamplerClient(opened),
            SamplerServiceStub(opened),
            address,
            backend,
            trainer,
            world,
            request.param,
        )
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


# --- adapters ------------------------------------------------------------------------------------


async def test_it_says_what_it_serves(sampler):
    await sampler.client.load_adapter(sampler.trainer.source(1))
    info = await sampler.client.get_sampler()
    assert (info.base_model, info.vocab_size) == (BASE_MODEL, len(VOCABULARY))
    assert (info.max_length, info.max_rank) == (MAX_LENGTH, 16)
    assert (info.backend, info.instance_id) == (sampler.name, "this one")
    assert (info.num_running, info.num_queued, info.reserved_kv_tokens) == (0, 0, 0)
    assert info.max_loras == MAX_LORAS
    assert (info.kv_tokens > MAX_LENGTH) == (sampler.name == "vllm")
    assert info.loaded == info.resident == (sampler.trainer.source(1, trainer_address=""),)


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
    chunks = sampler.chunks(source, PROMPT, 1, params)
    received = [await anext(chunks)]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(sampler.client.unload_adapter(ADAPTER))
        tasks.create_task(sampler.sample(sampler.trainer.source(2)))
        received += [chunk async for chunk in chunks]
    completion = join_chunks(received)
    assert list(completion.token_ids) == sampler.world.greedy(1, PROMPT, 60)
    assert completion.spans == (PolicySpan(60, 1, source.digest, "this one"),)


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


# --- callers that go away ------------------------------------------------------------------------


LONG = SamplingParams(seed=1, max_tokens=500, ignore_eos=True)


async def test_a_cancelled_call_ends_its_work_in_the_engine(sampler):
    chunks = sampler.chunks(sampler.trainer.source(0), PROMPT, 64, LONG)
    await anext(chunks)
    assert (await sampler.client.get_sampler()).num_running == 64
    await chunks.aclose()
    await sampler.idle()


async def test_a_call_cancelled_while_nobody_reads_ends_its_work_in_the_engine(sampler):
    call = sampler.stub.Sample(
        pb.SampleRequest(
            prompt_token_ids=PROMPT,
            num_completions=200,
            params={"max_tokens": 500},
            project="p",
        )
    )
    await call.read()
    call.cancel()
    await sampler.idle()


async def test_a_deadline_ends_the_work_in_the_engine(sampler):
    request = pb.SampleRequest(
        prompt_token_ids=PROMPT,
        num_completions=64,
        params={"max_tokens": 500, "ignore_eos": True},
        project="p",
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in sampler.stub.Sample(request, timeout=0.3):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await sampler.idle()


async def test_a_client_that_is_gone_ends_its_work_in_the_engine(sampler):
    async with channel(sampler.address) as opened:
        chunks = SamplerClient(opened).sample(None, PROMPT, 64, LONG, project="p")
        await anext(chunks)
    with contextlib.suppress(Exception):
        await chunks.aclose()
    await sampler.idle()


async def test_a_request_beyond_the_bound_is_refused_and_the_others_finish(sampler):
    params = SamplingParams(seed=1, max_tokens=40, ignore_eos=True)
    # One that fills the batch, and as many behind it as may wait.
    first = sampler.chunks(None, PROMPT, MAX_NUM_SEQS, LONG)
    await anext(first)
    async with asyncio.TaskGroup() as tasks:
        calls = [
            tasks.create_task(sampler.sample(params=params, project=f"p{number % 2}"))
            for number in range(MAX_QUEUED)
        ]
        async with asyncio.timeout(20):
            while (await sampler.client.get_sampler()).num_queued < MAX_QUEUED:
                await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await sampler.sample()
        assert caught.value.retry_after_s > 0
        await first.aclose()
    assert {len(call.result()[0].token_ids) for call in calls} == {40}


# --- whose keys and values -----------------------------------------------------------------------


async def test_keys_and_values_are_reused_within_a_project_and_a_version_alone(
    sampler, monkeypatch
):
    if sampler.name != "vllm":
        pytest.skip("this engine keeps none")
    engine = sampler.backend._engine
    generate = engine.generate
    reused = []

    async def watched(*args, **kwargs):
        async for output in generate(*args, **kwargs):
            reused.append(output.num_cached_tokens or 0)
            yield output

    monkeypatch.setattr(engine, "generate", watched)
    prompt = [(i * 7) % 40 + 2 for i in range(300)]

    async def num_reused(version, project):
        reused.clear()
        source = None if version is None else sampler.trainer.source(version)
        await sampler.sample(source, prompt, project=project)
        return max(reused)

    for version in (None, 0, 1):
        for project in ("p", "q"):
            assert await num_reused(version, project) == 0
            assert await num_reused(version, project) > 200
    # Not even by the same version once it was pulled again.
    await sampler.client.unload_adapter(ADAPTER)
    assert await num_reused(0, "p") == 0


# --- the end; last, for it kills the engine ------------------------------------------------------


async def test_a_dead_engine_is_noticed_and_fails_every_request(sampler):
    if sampler.name != "vllm":
        pytest.skip("an engine in the sampler's own process dies with it")
    sampler.dead = True
    [engine] = multiprocessing.active_children()
    chunks = sampler.chunks(None, PROMPT, 64, LONG)
    await anext(chunks)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(Unavailable):
        async for _ in chunks:
            pass
    assert "died" in await sampler.backend.failure()
    for call in (
        sampler.sample(),
        sampler.sample(sampler.trainer.source(0)),
        sampler.client.compute_logprobs(None, PROMPT, project="p"),
    ):
        with pytest.raises(Unavailable):
            await call
