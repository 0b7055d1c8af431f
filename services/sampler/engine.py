"""The sampler's core: admits requests, keeps their policy live, streams what the engine draws.

Every token is attributed to the version that the request held from its first token to its last.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from rollmesh.errors import Unavailable
from rollmesh.names import parse_adapter
from rollmesh.telemetry import span
from rollmesh.types import (
    BASE_VERSION,
    Continuation,
    Logprobs,
    PolicySpan,
    SamplerInfo,
    SamplingParams,
)
from services.sampler import validation
from services.sampler.admission import Need
from services.sampler.chunks import Chunks
from services.sampler.heartbeat import with_heartbeats
from services.sampler.policies import Policies

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

    from rollmesh.types import AdapterSource, CompletionChunk, LoadTimes
    from services.sampler.adapters import Adapters
    from services.sampler.backends.base import Backend, LoadedAdapter, Model
    from services.sampler.heartbeat import Pipe
    from services.sampler.slots import Running, Slots

SILENT_S = 1.0
"""An engine without a sign of life for so long is not asked for anything."""
DEAD_S = 60.0
"""One that is silent for so long will not come back."""
_LOOK_S = 1.0
"""Pause between two looks at how long it has been silent."""


class Sampler:
    """One base model in an engine, with adapters hot-swapped by version."""

    def __init__(
        self,
        backend: Backend,
        adapters: Adapters,
        slots: Slots,
        *,
        instance_id: str,
        base_model: str,
        max_rank: int,
        max_queued: int,
        chunk_tokens: int,
        new_seed: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._backend = backend
        self._adapters = adapters
        self._slots = slots
        self._instance_id = instance_id
        self._base_model = base_model
        self._max_rank = max_rank
        self._chunk_tokens = chunk_tokens
        self._new_seed = new_seed
        self._started: Model | None = None
        self._policies = Policies(adapters, slots, max_queued=max_queued, clock=clock)
        self._num_running = 0
        self._draining = False
        self._ended = asyncio.Event()

    async def start(self) -> None:
        """Return once the engine draws: what its first batch makes slow is paid for here."""
        model = await self._backend.start()
        draw = validation.resolve(
            SamplingParams(max_tokens=2, ignore_eos=True), 2, 1, model, self._new_seed
        )
        first = [Continuation(0), Continuation(1)]
        async for _ in self._backend.sample(None, [0], first, draw, project="sampler"):
            pass
        self._slots.open(model)
        self._started = model

    async def failure(self) -> str:
        """Wait until the engine is dead, or has been silent for DEAD_S; return why."""
        while True:
            try:
                async with asyncio.timeout(_LOOK_S):
                    return await self._backend.failure()
            except TimeoutError:
                silent_s = self._backend.silent_s()
                if silent_s >= DEAD_S:
                    return f"the engine has been silent for {silent_s:.0f} s"

    async def get_sampler(self) -> SamplerInfo:
        """What this sampler serves and how busy it is.

        Raises:
            Unavailable: the engine is starting, or silent.
        """
        model = self._model()
        here = self._adapters.here()
        return SamplerInfo(
            base_model=self._base_model,
            vocab_size=model.vocab_size,
            max_length=model.max_length,
            backend=self._backend.name,
            num_running=self._num_running,
            loaded=tuple(source for source, adapter in here if self._slots.proven(adapter)),
            max_rank=self._max_rank,
            instance_id=self._instance_id,
            num_queued=self._policies.num_queued,
            max_loras=model.max_loras,
            resident=tuple(source for source, adapter in here if self._slots.resident(adapter)),
            kv_tokens=model.kv_tokens,
            reserved_kv_tokens=self._slots.reserved_tokens,
            draining=self._draining,
        )

    async def drained(self, within_s: float) -> None:
        """Say that no more should come, and return once nothing runs or waits here.

        Or `within_s` seconds have passed. What comes all the same is served.
        """
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._num_running:
                    self._ended.clear()
                    await self._ended.wait()

    async def load_adapter(self, source: AdapterSource) -> LoadTimes:
        """Return once a version is live; errors as `Policies.load`."""
        validation.check_source(source)
        self._model()
        return await self._policies.load(source)

    async def unload_adapter(self, adapter: str, policy_version: int | None) -> None:
        """Return once a version (None: every version) is gone and no request uses it."""
        parse_adapter(adapter, field="adapter")
        await self._adapters.unload(adapter, policy_version)

    def sample(
        self,
        project: str,
        source: AdapterSource | None,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        params: SamplingParams,
        continuations: Sequence[Continuation] = (),
    ) -> AsyncGenerator[CompletionChunk | None]:
        """The chunks of all completions, or of `continuations` alone, each completion's in order.

        None is a sign of life. Closing the stream aborts the work.

        Raises:
            InvalidRequest: the context names the field.
            Overloaded: as many requests, or as many of this project, as may be wait here.
            Unavailable: the engine is starting, silent, dead or going away.
        """
        model = self._model()
        validation.check_project(project)
        validation.check_prompt(prompt_token_ids, model, field="prompt_token_ids")
        if source is not None:
            validation.check_source(source)
        num_prompt_tokens = len(prompt_token_ids)
        draw = validation.resolve(params, num_completions, num_prompt_tokens, model, self._new_seed)
        validation.check_continuations(continuations, num_completions, model, draw)
        begun = continuations or [Continuation(index) for index in range(num_completions)]
        # Greedy completions that go on from the same tokens are all the same one: it is drawn once.
        same: dict[object, list[Continuation]] = {}
        for completion in begun:
            key = completion.index if draw.temperature else completion.token_ids
            same.setdefault(key, []).append(completion)
        drawn = [completions[0] for completions in same.values()]
        indices = {each[0].index: [other.index for other in each] for each in same.values()}

        async def produce(pipe: Pipe[CompletionChunk]) -> None:
            chunks = Chunks(indices, self._chunk_tokens, self._origin(source))
            async with (
                self._begun(
                    project, source, Need(num_prompt_tokens, draw.max_tokens, len(drawn))
                ) as (adapter, running),
                contextlib.aclosing(
                    self._backend.sample(adapter, prompt_token_ids, drawn, draw, project=project)
                ) as deltas,
            ):
                async for delta in deltas:
                    for chunk in chunks.add(delta):
                        await pipe.put(chunk)
                    if delta.stop_reason is not None:
                        running.end_one()

        return with_heartbeats(produce, self._backend.silent_s)

    async def compute_logprobs(
        self, project: str, source: AdapterSource | None, token_ids: Sequence[int]
    ) -> Logprobs:
        """Log-probability of each token given those before it; errors as `sample`."""
        validation.check_project(project)
        validation.check_sequence(token_ids, self._model())
        if source is not None:
            validation.check_source(source)
        async with self._begun(project, source, Need(len(token_ids), 0, 1)) as (adapter, _):
            logprobs = await self._backend.compute_logprobs(adapter, token_ids, project=project)
        origin = self._origin(source)
        return Logprobs(tuple(logprobs), replace(origin, num_tokens=len(logprobs)))

    def _model(self) -> Model:
        """The model, of an engine that is alive."""
        if self._started is None:
            raise Unavailable("the engine is starting")
        silent_s = self._backend.silent_s()
        if silent_s >= SILENT_S:
            raise Unavailable(f"the engine has been silent for {silent_s:.1f} s")
        return self._started

    def _origin(self, source: AdapterSource | None) -> PolicySpan:
        """A span over no tokens yet. `source` None: the base model."""
        if source is None:
            return PolicySpan(0, BASE_VERSION, "", self._instance_id)
        # The backend has read this digest back from the tensors that it loaded.
        return PolicySpan(0, source.policy_version, source.digest, self._instance_id)

    @contextlib.asynccontextmanager
    async def _begun(
        self, project: str, source: AdapterSource | None, need: Need
    ) -> AsyncIterator[tuple[LoadedAdapter | None, Running]]:
        """Wait for all that a request needs, and keep it while the block runs."""
        self._num_running += need.num_completions
        try:
            with span("sampler.sample", num_completions=need.num_completions):
                async with self._policies.use(project, source, need) as begun:
                    yield begun
        finally:
            self._num_running -= need.num_completions
            self._ended.set()
