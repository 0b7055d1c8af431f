"""The sampler's core over an engine that does as it is told."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

import pytest

from rollmesh.errors import Overloaded, Unavailable
from rollmesh.types import BASE_VERSION, PolicySpan, SamplingParams
from services.sampler.__main__ import EngineDiedError, serve
from services.sampler.backends.base import Delta, Model
from services.sampler.config import SamplerConfig
from services.sampler.engine import Sampler


@dataclass
class FakeBackend:
    """Draws the tokens 0, 1, 2, … one by one; dies when told.

    Attributes:
        go: sampling goes on only while it is set.
        open: requests that are being drawn.
    """

    name: str = "fake"
    go: asyncio.Event = field(default_factory=asyncio.Event)
    dies: asyncio.Event = field(default_factory=asyncio.Event)
    open: int = 0
    stopped: bool = False

    async def start(self):
        self.go.set()
        return Model(vocab_size=100, max_length=50)

    async def stop(self):
        self.stopped = True

    async def failure(self):
        await self.dies.wait()
        return "it was told to"

    async def sample(self, adapter, prompt_token_ids, num_completions, draw):
        self.open += 1
        try:
            for token in range(draw.max_tokens):
                for index in range(num_completions):
                    await self.go.wait()
                    last = token == draw.max_tokens - 1
                    yield Delta(index, [token], [-float(token)], "length" if last else None)
        finally:
            self.open -= 1

    async def compute_logprobs(self, adapter, token_ids):
        return [math.nan, *[0.0] * (len(token_ids) - 1)]


class NoAdapters:
    def live(self):
        return ()


@pytest.fixture
def backend():
    return FakeBackend()


@pytest.fixture
async def sampler(backend):
    made = Sampler(
        backend,
        NoAdapters(),
        base_model="m",
        max_rank=8,
        max_queued=2,
        chunk_tokens=4,
        new_seed=lambda: 1,
    )
    await made.start()
    return made


async def chunks(sampler, num_completions=1, **params):
    drawn = sampler.sample(None, [1, 2], num_completions, SamplingParams(**params))
    return [chunk async for chunk in drawn]


async def test_tokens_are_gathered_into_chunks_and_none_is_lost(sampler):
    found = await chunks(sampler, 2, max_tokens=10)
    for index in range(2):
        pieces = [chunk for chunk in found if chunk.index == index]
        assert [piece.token_ids for piece in pieces] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
        assert [piece.stop_reason for piece in pieces] == [None, None, "length"]
        assert [piece.logprobs[0] for piece in pieces] == [0, -4, -8]
        assert [piece.spans for piece in pieces] == [
            (PolicySpan(count, BASE_VERSION, ""),) for count in (4, 4, 2)
        ]


async def test_greedy_completions_are_drawn_once_and_sent_for_each(sampler):
    found = await chunks(sampler, 3, max_tokens=2, temperature=0)
    assert [(chunk.index, chunk.token_ids) for chunk in found] == [(i, (0, 1)) for i in range(3)]


async def test_requests_beyond_the_bound_are_refused_until_one_ends(sampler, backend):
    backend.go.clear()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(2):
            tasks.create_task(chunks(sampler, 5, max_tokens=3))
        while backend.open < 2:
            await asyncio.sleep(0)
        assert (await sampler.get_sampler()).num_running == 10
        with pytest.raises(Overloaded) as caught:
            await chunks(sampler)
        with pytest.raises(Overloaded):
            await sampler.compute_logprobs(None, [1, 2])
        backend.go.set()
    assert caught.value.context == {"resource": "requests", "limit": "2"}
    assert (await sampler.get_sampler()).num_running == 0
    await chunks(sampler)


async def test_closing_the_stream_ends_the_work(sampler, backend):
    drawn = sampler.sample(None, [1], 1, SamplingParams(max_tokens=40))
    await anext(drawn)
    assert backend.open == 1
    await drawn.aclose()
    assert backend.open == 0
    assert (await sampler.get_sampler()).num_running == 0


async def test_before_its_start_a_sampler_is_unavailable(backend):
    sampler = Sampler(
        backend,
        NoAdapters(),
        base_model="m",
        max_rank=8,
        max_queued=2,
        chunk_tokens=4,
        new_seed=lambda: 1,
    )
    for call in (
        sampler.get_sampler(),
        chunks(sampler),
        sampler.compute_logprobs(None, [1, 2]),
    ):
        with pytest.raises(Unavailable):
            await call


class NeverStarts(FakeBackend):
    async def start(self):
        raise OSError("no such model")


@pytest.mark.parametrize(
    ("backend", "message"), [(FakeBackend(), "told to"), (NeverStarts(), "no such model")]
)
async def test_the_service_ends_with_an_error_when_its_engine_does(tmp_path, backend, message):
    config = SamplerConfig.model_validate(
        {
            "listen": "127.0.0.1:0",
            "base_model": {"name": "m", "path": "/m"},
            "cache_dir": str(tmp_path),
        }
    )
    backend.dies.set()
    with pytest.raises(ExceptionGroup) as caught:
        await serve(config, backend)
    [error] = caught.value.exceptions
    assert isinstance(error, EngineDiedError)
    assert message in str(error)
    assert backend.stopped
    assert not list(tmp_path.iterdir())
