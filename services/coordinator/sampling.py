"""The shared sampler fleet: a request runs whole on one sampler, or anew where that one is lost.

What is interactive fails after a few attempts; what a job asks for waits until the fleet is well.
Cancelling the caller takes its request out of the queue, or cancels the sampler's call.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.errors import (
    DeadlineExceeded,
    InternalError,
    MeshError,
    Overloaded,
    SourceUnavailable,
    Unavailable,
)
from services.coordinator.placement import Placement
from services.coordinator.retry import RETRY_FOR_S, backoff

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

    from services.coordinator.fleet.static import Sampler, StaticFleet
    from services.coordinator.ports import Lost
    from services.coordinator.scheduler import Scheduler

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often an interactive request is begun, and how many internal errors a job's may meet: a
request that breaks every engine it is given to must not go round for ever."""


@dataclass(frozen=True, slots=True)
class _Draw:
    """What one sampler is asked for: all completions of a request, or those from `first` on."""

    project: str
    base_model: str
    source: types.AdapterSource | None
    prompt_token_ids: Sequence[int]
    num_completions: int
    params: types.SamplingParams
    first: int = 0


class FleetSampling:
    """`ports.Sampling` over one fleet and one scheduler, which nobody else uses.

    Args:
        fleet: the samplers.
        scheduler: whose turn it is.
        locate: the same version, at the trainer that has its adapter by now: a request that waits
            for long may outlive the one it was given.
    """

    def __init__(
        self,
        fleet: StaticFleet,
        scheduler: Scheduler,
        *,
        locate: Callable[[types.AdapterSource], types.AdapterSource],
    ) -> None:
        self._fleet = fleet
        self._locate = locate
        self._scheduler = scheduler
        self._placement = Placement(fleet, scheduler)

    @property
    def num_queued_requests(self) -> int:
        """Requests that wait for a sampler."""
        return self._scheduler.num_queued

    async def stream(
        self,
        project: str,
        base_model: str,
        source: types.AdapterSource | None,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        params: types.SamplingParams,
    ) -> AsyncGenerator[types.CompletionChunk]:
        """Chunks as they come.

        Raises:
            Overloaded: the project's queue is full.
            Unavailable: no sampler of the base model serves, or one was lost after the first chunk.
        """
        draw = _Draw(project, base_model, source, prompt_token_ids, num_completions, params)
        for part in self._parts(draw):
            async with contextlib.aclosing(self._streamed(part)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def sample(
        self,
        project: str,
        base_model: str,
        source: types.AdapterSource | None,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        params: types.SamplingParams,
        *,
        lost: Lost,
    ) -> list[types.Completion]:
        """Whole completions, by index. Waits while the fleet heals, and while the queue is full.

        `lost` hears why, each time that it is a sampler which this waits for.

        Raises:
            SourceUnavailable: for RETRY_FOR_S no sampler could have the version.
        """
        draw = _Draw(project, base_model, source, prompt_token_ids, num_completions, params)
        chunks: list[list[types.CompletionChunk]] = [[] for _ in range(num_completions)]
        for part in self._parts(draw):
            for chunk in await self._collected(part, lost):
                chunks[chunk.index].append(chunk)
        return [types.join_chunks(of_one) for of_one in chunks]

    async def compute_logprobs(
        self,
        project: str,
        base_model: str,
        source: types.AdapterSource | None,
        token_ids: Sequence[int],
    ) -> types.Logprobs:
        """Log-probability of each token given those before it. Errors as `stream`."""
        for delay_s in self._attempts():
            self._check_served(base_model)
            request = self._placement.request(
                project, base_model, source, num_prompt_tokens=len(token_ids), num_completions=1
            )
            try:
                async with self._placement.sampler_for(request) as sampler:
                    return await sampler.port.compute_logprobs(source, token_ids)
            except (Unavailable, InternalError):
                if delay_s is None:
                    raise
                await asyncio.sleep(delay_s)
        raise AssertionError("the last attempt returns or raises")

    async def load(self, base_model: str, source: types.AdapterSource) -> None:
        """Return once the version is live on every sampler of the base model that is serving.

        One that is away, or goes away, is left out: it pulls the version with its first request.
        """
        async with asyncio.TaskGroup() as tasks:
            loads = [
                tasks.create_task(self._load_on(sampler, source))
                for sampler in self._fleet.samplers(base_model)
            ]
        for error in filter(None, (load.result() for load in loads)):
            raise error

    async def unload(self, base_model: str, adapter: str, policy_version: int | None) -> None:
        """Let go of a version (None: all) everywhere; best effort."""
        async with asyncio.TaskGroup() as tasks:
            for sampler in self._fleet.samplers(base_model):
                tasks.create_task(self._unload_on(sampler, adapter, policy_version))

    def _parts(self, draw: _Draw) -> Iterator[_Draw]:
        """`draw` in what one sampler may run at once: mostly one part, else one after the other."""
        most = self._scheduler.max_running_completions
        for first in range(0, draw.num_completions, most):
            count = min(most, draw.num_completions - first)
            params = _seeded(draw.params, first)
            yield replace(draw, first=first, num_completions=count, params=params)

    async def _collected(self, draw: _Draw, lost: Lost) -> list[types.CompletionChunk]:
        """All chunks of `draw`, from the first sampler that is not lost over it."""
        clock = asyncio.get_running_loop().time
        delays = backoff()
        num_internal_errors = 0
        without_source_since: float | None = None
        while True:
            if not self._fleet.samplers(draw.base_model):
                await lost(f"no sampler of {draw.base_model!r} serves now")
            try:
                return [chunk async for chunk in self._attempt(draw)]
            except SourceUnavailable as error:
                without_source_since = without_source_since or clock()
                if clock() - without_source_since >= RETRY_FOR_S:
                    raise SourceUnavailable(
                        f"for {RETRY_FOR_S:g} s no sampler could have the policy from its "
                        f"trainer: {error}",
                        **error.context,
                    ) from error
                await lost(str(error))
            except Unavailable as error:
                without_source_since = None
                await lost(str(error))
            except Overloaded as error:
                log.info("a sample request is tried again: %s", error)
            except InternalError as error:
                num_internal_errors += 1
                if num_internal_errors == ATTEMPTS:
                    raise
                await lost(str(error))
            await asyncio.sleep(next(delays))

    async def _streamed(self, draw: _Draw) -> AsyncGenerator[types.CompletionChunk]:
        """The chunks of `draw` as they come; begun again only while none has come."""
        for delay_s in self._attempts():
            self._check_served(draw.base_model)
            begun = False
            try:
                async with contextlib.aclosing(self._attempt(draw)) as chunks:
                    async for chunk in chunks:
                        begun = True
                        yield chunk
            except (Unavailable, InternalError) as error:
                if begun:
                    raise Unavailable(f"the sampler was lost in the middle: {error}") from error
                if delay_s is None:
                    raise
                await asyncio.sleep(delay_s)
            else:
                return

    def _attempts(self) -> Iterator[float | None]:
        """For each attempt the seconds to wait after it; None: it is the last."""
        delays = backoff()
        yield from (next(delays) for _ in range(ATTEMPTS - 1))
        yield None

    async def _attempt(self, draw: _Draw) -> AsyncGenerator[types.CompletionChunk]:
        """All chunks of `draw` from one sampler, once its turn has come."""
        request = self._placement.request(
            draw.project,
            draw.base_model,
            draw.source,
            num_prompt_tokens=len(draw.prompt_token_ids),
            num_completions=draw.num_completions,
        )
        unfinished = draw.num_completions
        async with self._placement.sampler_for(request) as sampler:
            chunks = sampler.port.sample(
                draw.source and self._locate(draw.source),
                draw.prompt_token_ids,
                draw.num_completions,
                draw.params,
            )
            # Left in the middle it has to be closed at once for the sampler to stop.
            async with contextlib.aclosing(chunks) as closing:
                async for chunk in closing:
                    ended = chunk.stop_reason is not None
                    unfinished -= ended
                    self._placement.progress(request, num_tokens=len(chunk.token_ids), ended=ended)
                    yield replace(chunk, index=chunk.index + draw.first)
            if unfinished:
                raise Unavailable(
                    f"the sampler at {sampler.address} ended its stream with {unfinished} of "
                    f"{draw.num_completions} completions unfinished"
                )

    def _check_served(self, base_model: str) -> None:
        if not self._fleet.samplers(base_model):
            raise Unavailable(f"no sampler of {base_model!r} serves now", base_model=base_model)

    async def _load_on(self, sampler: Sampler, source: types.AdapterSource) -> MeshError | None:
        try:
            await sampler.port.load_adapter(source)
        except (Overloaded, SourceUnavailable) as error:
            log.warning("%s is not loaded at %s: %s", source.adapter, sampler.address, error)
            return None
        except (Unavailable, DeadlineExceeded, InternalError) as error:
            self._fleet.suspect(sampler, str(error))
            return None
        except MeshError as error:
            return error
        self._placement.note_loaded(sampler, (source.adapter, source.policy_version))
        return None

    async def _unload_on(self, sampler: Sampler, adapter: str, policy_version: int | None) -> None:
        self._placement.note_unloaded(sampler, adapter, policy_version)
        try:
            await sampler.port.unload_adapter(adapter, policy_version)
        except MeshError as error:
            log.info("%s is not unloaded at %s: %s", adapter, sampler.address, error)


def _seeded(params: types.SamplingParams, first: int) -> types.SamplingParams:
    """The parameters of the part from `first` on, which must not repeat the first part's draws."""
    if params.seed is None or not first:
        return params
    digest = hashlib.sha256(f"{params.seed}/{first}".encode()).digest()
    return replace(params, seed=int.from_bytes(digest[:6]))
