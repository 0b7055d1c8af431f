"""An engine that computes in steps, all sequences together, and insists on how it is to be used."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from dataclasses import replace

from rollmesh.types import AdapterSource, PromptLogprobs
from services.sampler.backends.base import Delta, LoadedAdapter, Model


class FakeEngine:
    """A Backend whose tokens tell which adapter made them: 100 × its number + the place.

    A step takes `step_s`, and `token_s` for each of at most `max_num_seqs` sequences. A load takes
    `load_s`, in which nothing else happens, an unload `unload_s`. Completions have `max_tokens`
    tokens, or with `early` a random number of at most as many.

    Attributes:
        slots: numbers of the adapters that are loaded.
        sequences: that are drawn or wait for it.
        num_tokens: that it computed.
        num_taken: of those, that were taken from it.
        asked: arguments of each request.
        load_errors: by number, what loading that adapter raises.
        go: it computes only while it is set.
        silence_s: what it tells of its last sign of life.
    """

    name = "fake"

    def __init__(
        self,
        *,
        max_loras=2,
        kv_tokens=0,
        step_s=0.01,
        token_s=0.0,
        load_s=0.02,
        unload_s=0.0,
        max_num_seqs=256,
        early=False,
    ):
        self.model = Model(100_000, 1000, max_loras, kv_tokens)
        self.step_s, self.token_s, self.load_s = step_s, token_s, load_s
        self.unload_s = unload_s
        self.max_num_seqs = max_num_seqs
        self.early = early
        self.slots: set[int] = set()
        self.sequences: list[_Sequence] = []
        self.asked: list[tuple] = []
        self.load_errors: dict[int, Exception] = {}
        self.loads: list[int] = []
        self.num_tokens = 0
        self.num_taken = 0
        self.silence_s = 0.0
        self.go = asyncio.Event()
        self.go.set()
        self.dies = asyncio.Event()
        self.stopped = False
        self._busy = asyncio.Lock()
        # Loads and unloads, in the order in which they were begun.
        self._changing = asyncio.Lock()
        self._stepping = None

    async def start(self):
        return self.model

    async def stop(self):
        self.stopped = True

    async def failure(self):
        await self.dies.wait()
        return "it was told to"

    def silent_s(self):
        return self.silence_s

    async def load(self, adapter):
        assert adapter.number not in self.slots
        async with self._changing, self._busy:
            assert len(self.slots) < self.model.max_loras, "no slot is free"
            await asyncio.sleep(self.load_s)
            await self.go.wait()
            self.loads.append(adapter.number)
            if adapter.number in self.load_errors:
                raise self.load_errors[adapter.number]
            self.slots.add(adapter.number)

    async def unload(self, adapter):
        assert all(sequence.number != adapter.number for sequence in self.sequences), "it is used"
        async with self._changing:
            await asyncio.sleep(self.unload_s)
            self.slots.remove(adapter.number)

    async def sample(self, adapter, prompt_token_ids, completions, draw, *, project):
        self.asked.append((adapter, tuple(prompt_token_ids), tuple(completions), draw, project))
        number = adapter.number if adapter else 0
        assert not number or number in self.slots, "it is not loaded"
        deltas: asyncio.Queue[Delta] = asyncio.Queue()
        mine = [
            _Sequence(number, completion, self._length(draw, completion), deltas)
            for completion in completions
        ]
        prompt = None
        if draw.prompt_logprobs is not None:
            prompt = PromptLogprobs(tuple(-1.0 for _ in prompt_token_ids), (), ())
        self.sequences += mine
        self._step_on()
        try:
            for _ in range(sum(sequence.length - sequence.place for sequence in mine)):
                delta = await deltas.get()
                self.num_taken += 1
                top = {}
                if draw.top_logprobs is not None:
                    [token] = delta.token_ids
                    ids = [token + place for place in range(draw.top_logprobs)]
                    values = [-float(each) for each in ids]
                    top = {"top_token_ids": [ids], "top_logprobs": [values]}
                yield replace(delta, prompt_logprobs=prompt, **top)
                prompt = None
        finally:
            self.sequences = [sequence for sequence in self.sequences if sequence not in mine]

    def _length(self, draw, completion):
        if not self.early:
            return draw.max_tokens
        drawn = random.Random(f"{draw.seed}/{completion.index}").randint(1, draw.max_tokens)
        return max(drawn, len(completion.token_ids) + 1)

    def _step_on(self):
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.ensure_future(self._steps())

    async def _steps(self):
        while self.sequences:
            async with self._busy:
                await self.go.wait()
                batch = self.sequences[: self.max_num_seqs]
                await asyncio.sleep(self.step_s + self.token_s * len(batch))
            for sequence in batch:
                self.num_tokens += 1
                sequence.step()
            self.sequences = [each for each in self.sequences if each.place < each.length]
            # Whoever was answered may ask again before the next step.
            for _ in range(10):
                await asyncio.sleep(0)

    async def compute_logprobs(self, adapter, token_ids, *, project):
        number = adapter.number if adapter else 0
        assert not number or number in self.slots, "it is not loaded"
        await asyncio.sleep(self.step_s)
        return [math.nan, *[float(-number)] * (len(token_ids) - 1)]


class _Sequence:
    def __init__(self, number, completion, length, deltas):
        self.number = number
        self.index = completion.index
        self.place = len(completion.token_ids)
        self.length = length
        self.deltas = deltas

    def step(self):
        token = 100 * self.number + self.place
        self.place += 1
        last = "length" if self.place == self.length else None
        self.deltas.put_nowait(Delta(self.index, [token], [-float(token)], last))


class FakeAdapters:
    """Adapters that come at once while `go` is set.

    Attributes:
        held: by number, how many hold it.
        discarded: numbers of the copies that were.
    """

    def __init__(self, folder):
        self.folder = folder
        self.go = asyncio.Event()
        self.go.set()
        self.held: dict[int, int] = {}
        self.discarded: list[int] = []
        self._versions: dict[AdapterSource, LoadedAdapter] = {}

    def loaded(self, source):
        if source not in self._versions:
            number = len(self._versions) + len(self.discarded) + 1
            self._versions[source] = LoadedAdapter(
                number, f"{source.adapter}#{number}", self.folder, source.digest
            )
        return self._versions[source]

    def here(self):
        return tuple(self._versions.items())

    def is_here(self, source):
        return self.go.is_set() and source in self._versions

    async def pull(self, source):
        await self.go.wait()
        self.loaded(source)
        return 0.5

    @contextlib.asynccontextmanager
    async def hold(self, source):
        await self.go.wait()
        adapter = self.loaded(source)
        self.held[adapter.number] = self.held.get(adapter.number, 0) + 1
        try:
            yield adapter
        finally:
            self.held[adapter.number] -= 1

    def discard(self, adapter):
        for source, known in self._versions.items():
            if known is adapter:
                del self._versions[source]
                self.discarded.append(adapter.number)
                return
