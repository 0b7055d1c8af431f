"""Samplers that decode, die, stall, lie, come back and remember what became of every call."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

from rollmesh import types
from rollmesh.errors import Overloaded, Unavailable


def token_of(seed, index, place):
    """What every sampler draws there, whatever came before and wherever it began."""
    return random.Random(f"{seed}/{index}/{place}").randrange(1000)


def drawn(seed, index, num_tokens=5):
    """A whole completion."""
    return tuple(token_of(seed, index, place) for place in range(num_tokens))


class _Silent(Exception):
    """A sampler answers no more."""


class FakeSampler:
    """Each completion has `num_tokens` tokens, each of which takes `token_s`."""

    def __init__(self, base_model="tiny", *, token_s=1.0, num_tokens=5, name="sampler"):
        self.base_model = base_model
        self.token_s = token_s
        self.num_tokens = num_tokens
        self.lengths: dict[int, int] = {}  # of completions by index, where not num_tokens
        self.name = name
        self.num_starts = 1
        self.alive = True
        self.stalled = False
        self.draining = False
        self.loaded: set[tuple[str, int]] = set()
        self.resident: set[tuple[str, int]] = set()
        self.max_loras = 0
        self.num_queued = 0
        self.running = 0
        self.most_running = 0
        self.begun = 0
        self.aborted = 0
        self.asked: list[tuple] = []
        self.faults: list[Exception] = []
        self.load_fault: Exception | None = None
        self.load_s: float | None = None
        self.torn_streams = 0
        self.refusals = 0
        self.refusal = Overloaded("the queue is full")
        self.lie = lambda chunk: chunk
        self._died = asyncio.Event()
        self._stalled = asyncio.Event()

    @property
    def instance_id(self):
        return f"{self.name}-{self.num_starts}"

    def die(self):
        """Every call under way fails, as do those to come; what was loaded is gone."""
        self.alive = False
        self.loaded.clear()
        self.resident.clear()
        self._died.set()

    def revive(self):
        """Another process is there, and well."""
        self.num_starts += 1
        self.alive = True
        self.stalled = False
        self._died, self._stalled = asyncio.Event(), asyncio.Event()

    def stall(self):
        """It answers nothing, and its streams are silent; whoever waits learns it from that."""
        self.stalled = True
        self._stalled.set()

    async def _check(self):
        if not self.alive:
            raise Unavailable("connection refused")
        if self.stalled:
            await asyncio.Event().wait()

    async def _work(self, seconds):
        if not self.alive:
            raise Unavailable("connection refused")
        died, stalled = self._died, self._stalled
        try:
            async with asyncio.timeout(seconds):
                await _either(died, stalled)
        except TimeoutError:
            return
        if died.is_set():
            raise Unavailable("connection reset")
        raise _Silent

    async def _unary(self, seconds):
        try:
            await self._work(seconds)
        except _Silent:
            await asyncio.Event().wait()

    async def get_sampler(self):
        await self._check()
        return types.SamplerInfo(
            self.base_model,
            100,
            512,
            "fake",
            self.running,
            _sources(self.loaded),
            64,
            instance_id=self.instance_id,
            num_queued=self.num_queued,
            max_loras=self.max_loras,
            resident=_sources(self.resident),
            draining=self.draining,
        )

    async def load_adapter(self, source):
        await self._unary(self.token_s if self.load_s is None else self.load_s)
        if self.load_fault:
            raise self.load_fault
        self.loaded.add((source.adapter, source.policy_version))
        return types.LoadTimes(0.0, 0.0)

    async def unload_adapter(self, adapter, policy_version=None):
        await self._check()
        self.loaded = {
            live
            for live in self.loaded
            if live[0] != adapter or policy_version not in {None, live[1]}
        }

    async def sample(
        self, source, prompt_token_ids, num_completions, params, *, project, continuations=()
    ):
        self._check_room()
        self.begun += 1
        self.asked.append((source, project, params, tuple(continuations)))
        asked = continuations or [types.Continuation(n) for n in range(num_completions)]
        tokens = {begun.index: list(begun.token_ids) for begun in asked}
        self.running += len(tokens)
        self.most_running = max(self.most_running, self.running)
        prompt = _prompt_logprobs(prompt_token_ids, params)
        try:
            while tokens:
                await self._work(self.token_s)
                if self.faults:
                    raise self.faults.pop(0)
                if self.torn_streams and any(
                    len(had) == self._length(index) - 1 for index, had in tokens.items()
                ):
                    self.torn_streams -= 1
                    return
                for index in list(tokens):
                    chunk = self._next(index, tokens[index], source, params)
                    yield self.lie(replace(chunk, prompt_logprobs=prompt))
                    prompt = None
                    if chunk.stop_reason:
                        del tokens[index]
                        self.running -= 1
        except _Silent:
            await asyncio.sleep(types.SILENCE_S)
            raise Unavailable(f"nothing came for {types.SILENCE_S} s") from None
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise
        finally:
            self.running -= len(tokens)

    def _next(self, index, tokens, source, params):
        if len(tokens) >= self._length(index):
            return types.CompletionChunk(index, (), (), (), "length")
        token = token_of(params.seed, index, len(tokens))
        tokens.append(token)
        return types.CompletionChunk(
            index=index,
            token_ids=(token,),
            logprobs=(-1.0,),
            spans=(self._span(source),),
            stop_reason="length" if len(tokens) == self._length(index) else None,
            **top_of(token, params.top_logprobs),
        )

    def _length(self, index):
        return self.lengths.get(index, self.num_tokens)

    def _span(self, source, num_tokens=1):
        if source is None:
            return types.PolicySpan(num_tokens, types.BASE_VERSION, "", self.instance_id)
        return types.PolicySpan(num_tokens, source.policy_version, source.digest, self.instance_id)

    def _check_room(self):
        if self.refusals:
            self.refusals -= 1
            raise self.refusal

    async def compute_logprobs(self, source, token_ids, *, project):
        self._check_room()
        self.begun += 1
        await self._unary(self.token_s)
        if self.faults:
            raise self.faults.pop(0)
        return types.Logprobs(
            tuple(float(n) for n in token_ids), self._span(source, len(token_ids))
        )


def top_of(token, num_top):
    """The fields of a chunk of one token for a request that asks for so many likeliest."""
    if num_top is None:
        return {}
    ids = tuple(range(token, token + num_top))
    return {"top_token_ids": (ids,), "top_logprobs": (tuple(-float(each) for each in ids),)}


def _sources(versions):
    return tuple(types.AdapterSource(name, n, "d") for name, n in sorted(versions))


def _prompt_logprobs(prompt_token_ids, params):
    if params.prompt_logprobs is None:
        return None
    return types.PromptLogprobs(tuple(-0.25 for _ in prompt_token_ids), (), ())


async def _either(*events):
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
