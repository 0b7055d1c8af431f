"""Samplers that decode, die, come back and remember what became of every call."""

from __future__ import annotations

import asyncio

from rollmesh import types
from rollmesh.errors import Unavailable


class FakeSampler:
    """A sampler of `base_model`; each token takes `token_s`. It draws its own `tag` as tokens."""

    def __init__(self, base_model="tiny", *, token_s=1.0, num_tokens=5, tag=0):
        self.base_model = base_model
        self.token_s = token_s
        self.num_tokens = num_tokens
        self.tag = tag
        self.alive = True
        self.loaded: set[tuple[str, int]] = set()
        self.running = 0
        self.most_running = 0
        self.begun = 0
        self.aborted = 0
        self.seeds: list[int | None] = []
        self.faults: list[Exception] = []
        self.load_fault: Exception | None = None
        self.torn_streams = 0
        self._died = asyncio.Event()

    def die(self):
        """Every call under way fails, as do those to come; what was loaded is gone."""
        self.alive = False
        self.loaded.clear()
        self._died.set()

    def revive(self):
        self.alive = True
        self._died = asyncio.Event()

    def _check(self):
        if not self.alive:
            raise Unavailable("connection refused")

    async def _work(self, seconds):
        self._check()
        died = self._died
        try:
            async with asyncio.timeout(seconds):
                await died.wait()
        except TimeoutError:
            return
        raise Unavailable("connection reset")

    async def get_sampler(self):
        self._check()
        loaded = tuple(types.AdapterSource(name, n, "d") for name, n in sorted(self.loaded))
        return types.SamplerInfo(self.base_model, 100, 512, "fake", self.running, loaded, 64)

    async def load_adapter(self, source):
        await self._work(self.token_s)
        if self.load_fault:
            raise self.load_fault
        self.loaded.add((source.adapter, source.policy_version))
        return types.LoadTimes(0.0, 0.0)

    async def unload_adapter(self, adapter, policy_version=None):
        self._check()
        self.loaded = {
            live
            for live in self.loaded
            if live[0] != adapter or policy_version not in {None, live[1]}
        }

    async def sample(self, source, prompt_token_ids, num_completions, params):
        self._check()
        self.begun += 1
        self.seeds.append(params.seed)
        self.running += num_completions
        self.most_running = max(self.most_running, self.running)
        left = num_completions
        try:
            for n in range(1, self.num_tokens + 1):
                await self._work(self.token_s)
                if self.faults:
                    raise self.faults.pop(0)
                if self.torn_streams and n == self.num_tokens:
                    self.torn_streams -= 1
                    return
                for index in range(num_completions):
                    ended = n == self.num_tokens
                    left -= ended
                    self.running -= ended
                    yield types.CompletionChunk(
                        index=index,
                        token_ids=(self.tag,),
                        logprobs=(-1.0,),
                        spans=(types.PolicySpan(1, 0, "d"),),
                        stop_reason="length" if ended else None,
                    )
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise
        finally:
            self.running -= left

    async def compute_logprobs(self, source, token_ids):
        self.begun += 1
        await self._work(self.token_s)
        if self.faults:
            raise self.faults.pop(0)
        return types.Logprobs(tuple(float(n) for n in token_ids), types.PolicySpan(1, 0, "d"))
