"""The shared sampler fleet: a request goes on wherever its sampler is lost, and keeps what it has.

What is interactive fails after a few attempts; what a job asks for waits until the fleet is well.
Cancelling the caller takes its request out of the queue, or cancels the sampler's call.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.errors import InvalidRequest, MeshError
from services.coordinator.attempts import Asked, Attempts
from services.coordinator.drawing import Drawing, check_spans, is_constrained
from services.coordinator.endurance import Endurance, Interactive, OfJob
from services.coordinator.loading import Loading
from services.coordinator.placement import Placement, Preempted, Refused

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from rollmesh.job import Priority
    from services.coordinator.endurance import Endurance
    from services.coordinator.fleet.membership import Fleet, Sampler
    from services.coordinator.newest import Newest
    from services.coordinator.ports import Lost
    from services.coordinator.scheduler import Scheduler

BACK_WITHIN_S = 0.25
"""A sampler that another request's failure put out by mistake is back within this time."""


class FleetSampling:
    """`ports.Sampling` over one fleet and one scheduler, which nobody else uses.

    Args:
        fleet: the samplers.
        scheduler: whose turn it is.
        locate: the same version, at the trainer that has its adapter by now: a request that waits
            for long may outlive the one it was given.
        new_seed: for requests without one, so that every sampler of a request draws with the same.
        clock: Unix seconds.
    """

    def __init__(
        self,
        fleet: Fleet,
        scheduler: Scheduler,
        *,
        locate: Callable[[types.AdapterSource], types.AdapterSource],
        new_seed: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._scheduler = scheduler
        self._locate = locate
        self._new_seed = new_seed
        self._placement = Placement(fleet, scheduler, clock=clock)
        self.dispatch = self._placement.dispatch
        self._attempts = Attempts(self._placement, locate)
        loading = Loading(fleet, self._placement)
        self.load = loading.load
        self.unload = loading.unload
        self.quarantine = fleet.refuse
        self.end_quarantines = fleet.forgive

    @property
    def num_queued_requests(self) -> int:
        """Requests that wait for a sampler."""
        return self._scheduler.num_queued

    def context_length(self, base_model: str) -> int | None:
        """Tokens of prompt and completion together that every sampler takes; None: not known."""
        infos = [sampler.info for sampler in self._fleet.samplers(base_model)]
        return min((info.max_length for info in infos if info), default=None)

    async def stream(
        self,
        project: str,
        base_model: str,
        source: types.AdapterSource | None,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        params: types.SamplingParams,
        *,
        newest: Newest | None = None,
        priority: Priority = "normal",
        told: Callable[[str], None] | None = None,
    ) -> AsyncGenerator[types.CompletionChunk]:
        """Chunks as they come; where a sampler is lost, another one goes on.

        `told` hears the scheduler's subject of each request that is made of this one.

        Raises:
            Overloaded: the project's queue is full, or samplers' are again and again.
            QuotaExceeded: a quota of the project is used up.
            Unavailable: no sampler of the base model serves, or samplers were lost a few times in a
                row before a token came, or did not have the version.
            InvalidRequest: `newest` with a constraint, which cannot be continued.
        """
        asked = Asked(project, base_model, source, newest, priority=priority, told=told)
        drawing = self._drawing(asked, prompt_token_ids, num_completions, params)
        async with contextlib.aclosing(self._drawn(asked, drawing, Interactive())) as chunks:
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
        newest: Newest | None = None,
        job: str = "",
        priority: Priority = "normal",
    ) -> list[types.Completion]:
        """Whole completions, by index.

        Waits while the fleet heals, while the queue is full, and while a quota is used up.

        `lost` hears why, each time that it is a sampler which this waits for.

        Raises:
            SourceUnavailable: for RETRY_FOR_S no sampler could have the version.
            InvalidRequest: as `stream`.
        """
        asked = Asked(project, base_model, source, newest, job, priority)
        drawing = self._drawing(asked, prompt_token_ids, num_completions, params)
        chunks: list[list[types.CompletionChunk]] = [[] for _ in range(num_completions)]
        async with contextlib.aclosing(self._drawn(asked, drawing, OfJob(lost))) as drawn:
            async for chunk in drawn:
                chunks[chunk.index].append(chunk)
        return [types.join_chunks(of_one) for of_one in chunks]

    async def compute_logprobs(
        self,
        project: str,
        base_model: str,
        source: types.AdapterSource | None,
        token_ids: Sequence[int],
        *,
        job: str = "",
        lost: Lost | None = None,
        priority: Priority = "normal",
    ) -> types.Logprobs:
        """Log-probability of each token given those before it. Errors as `stream`.

        With `lost` it waits as `sample` does.
        """
        endurance: Endurance = OfJob(lost) if lost else Interactive()
        resumed = False
        while True:
            await endurance.served(self._fleet.unserved(base_model, job=job))
            request = self._placement.request(
                project,
                base_model,
                source,
                token_ids,
                num_completions=1,
                max_tokens=0,
                job=job,
                priority=priority,
                # It is one pass over the tokens, of which nothing could be kept.
                preemptible=False,
                resumed=resumed,
            )
            try:
                async with self._placement.place_for(request, endurance) as place:
                    resumed = True
                    return await self._logprobs(place.sampler, source, token_ids, project)
            except Refused as refused:
                endurance.refused(refused.error)
            except MeshError as error:
                await endurance.failed(error)

    def _drawing(
        self,
        asked: Asked,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        params: types.SamplingParams,
    ) -> Drawing:
        if asked.newest and is_constrained(params):
            raise InvalidRequest(
                "continue_on_newest: a completion with a json_schema or regex cannot be continued",
                field="continue_on_newest",
                value=True,
                allowed="false with params.json_schema or params.regex",
            )
        if params.seed is None:
            params = replace(params, seed=self._new_seed())
        return Drawing(prompt_token_ids, num_completions, params)

    async def _drawn(
        self, asked: Asked, drawing: Drawing, endurance: Endurance
    ) -> AsyncGenerator[types.CompletionChunk]:
        """All chunks of a request, from as many samplers as it takes.

        Once it has had a place it goes before whatever its project has waiting, and no full queue
        refuses it: what has come is worth more than what has not begun.
        """
        avoid = ""
        for part in drawing.parts(self._scheduler.max_running_completions):
            while unfinished := drawing.unfinished(part):
                await endurance.served(self._fleet.unserved(asked.base_model, job=asked.job))
                request = self._placement.request(
                    asked.project,
                    asked.base_model,
                    asked.source,
                    drawing.prompt_token_ids,
                    num_completions=len(unfinished),
                    max_tokens=drawing.params.max_tokens,
                    job=asked.job,
                    priority=asked.priority,
                    # An engine begins these anew: what was drawn would be drawn again.
                    preemptible=not is_constrained(drawing.params),
                    resumed=bool(drawing.address),
                    anew=not drawing.has_begun(part),
                    avoid=avoid,
                )
                avoid = ""
                if asked.told:
                    asked.told(request.subject)
                attempt = self._attempts.attempt(request, asked, drawing, part, endurance)
                try:
                    # Left in the middle it has to be closed at once for the sampler to stop.
                    async with contextlib.aclosing(attempt) as chunks:
                        async for chunk in chunks:
                            endurance.progressed()
                            yield chunk
                except Preempted:
                    continue
                except Refused as refused:
                    endurance.refused(refused.error)
                except MeshError as error:
                    avoid = drawing.address
                    await endurance.failed(error)

    async def _logprobs(
        self,
        sampler: Sampler,
        source: types.AdapterSource | None,
        token_ids: Sequence[int],
        project: str,
    ) -> types.Logprobs:
        # The call is silent until it ends: only the fleet's polls tell that its sampler stalls.
        async with self._placement.while_serving(sampler, for_s=BACK_WITHIN_S):
            found = await sampler.port.compute_logprobs(
                source and self._locate(source), token_ids, project=project
            )
        check_spans([found.span], len(token_ids), len(found.logprobs), source)
        return found
