"""Managed jobs as their users see them: the core of JobService.

It writes to the store and nothing else; the runner sees there what is to run, pause or stop.
"""

from __future__ import annotations

import asyncio
from itertools import chain
from typing import TYPE_CHECKING

from rollmesh.errors import (
    CapacityExhausted,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from rollmesh.job import FINAL_STATES, StateChanged
from rollmesh.names import adapter_name, check_id, job_name, parse_job, parse_project
from rollmesh.types import LoraConfig
from services.coordinator.paging import page_size_of
from services.coordinator.projects import check_priority
from services.coordinator.prompts import check_templates
from services.coordinator.store import NewJob, Request
from services.coordinator.tasks import Taskmaster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from rollmesh.job import AdapterSpec, Job, JobEvent, JobSpec, QueueStatus
    from services.coordinator.base_models import BaseModels
    from services.coordinator.checks import Checks
    from services.coordinator.fleet.membership import Fleet
    from services.coordinator.lifecycle import Command
    from services.coordinator.ports import EnvironmentPort
    from services.coordinator.scheduler import Projects
    from services.coordinator.store import JobStore


class Jobs:
    """Jobs of all projects.

    Args:
        store: where they are kept.
        fleet: what is served.
        environments: which have tasks.
        base_models: those that the mesh knows.
        checks: what else of a spec can be seen to fail.
        projects: what each of them may ask for.
        queue: where a job that waits stands; None: that is not known yet.
        problems: what a job that runs waits for, because it is away.
        max_pending: jobs that may wait at once, over all projects.
        clock: Unix seconds.
        new_id: makes up an id for a job that was given none.
    """

    def __init__(
        self,
        store: JobStore,
        fleet: Fleet,
        environments: EnvironmentPort,
        *,
        base_models: BaseModels,
        checks: Checks,
        projects: Projects,
        queue: Callable[[str], QueueStatus | None],
        problems: Callable[[str], list[str]],
        max_pending: int,
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._tasks = Taskmaster(environments)
        self._base_models = base_models
        self._checks = checks
        self._projects = projects
        self._queue = queue
        self._problems = problems
        self._max_pending = max_pending
        self._clock = clock
        self._new_id = new_id

    async def create(self, parent: str, job_id: str, spec: JobSpec, *, request_id: str) -> Job:
        """Check and store a job.

        Raises:
            InvalidRequest: the key of the spec is the field.
            NotFound: nobody serves the base model.
            AlreadyExists: the id, the adapter's or the request_id is taken.
            Overloaded: too many jobs wait.
            Unavailable: the mesh is still starting, or the reward service is away.
        """
        project = parse_project(parent)
        if job_id:
            check_id(job_id, field="job_id")
        request = await asyncio.to_thread(_request, project, request_id, job_id, spec)
        made = await self._store.find_request(request)
        if made is not None:
            return self._told(await self._store.get(made))
        new = await self.prepare(project, job_id or self._new_id(), spec)
        return await self._store.create(
            new, request=request, max_pending=self._max_pending, now=self._clock()
        )

    async def prepare(
        self, project: str, job_id: str, spec: JobSpec, *, tasks_are_checked: bool = False
    ) -> NewJob:
        """Check a job that is to be stored.

        Its adapter is named like the job, unless the spec has a name for it. `tasks_are_checked`:
        not again its tasks, prompts and reward.

        Raises:
            InvalidRequest, NotFound, Unavailable: as `create`.
        """
        adapter_id = spec.adapter.id or job_id
        named = spec.adapter.model_copy(update={"id": adapter_id})
        priority = check_priority(self._projects.of(project), spec.priority)
        spec = spec.model_copy(update={"adapter": named, "priority": priority})
        self._base_models.check(spec.base_model, field="base_model", refusal=NotFound)
        self._check_adapter(spec)
        await self._checks.teacher(project, spec)
        if not tasks_are_checked:
            await self._check_tasks(project, spec)
        return await NewJob.of(
            job_name(project, job_id),
            project,
            spec,
            adapter=adapter_name(project, adapter_id),
            lora=lora_of(spec.adapter),
        )

    def check_room(
        self, project: str, wanted: Mapping[str, int], others: Mapping[tuple[str, str], int]
    ) -> None:
        """Refuse jobs at once whose adapters may never be there together.

        Each keeps its adapter while it waits for the others. Had they room for some each, two
        sweeps would wait for each other for good; so there has to be room for all of both.

        Args:
            project: of the jobs.
            wanted: jobs by base model.
            others: those that wait for each other already, by project and base model.

        Raises:
            CapacityExhausted: the trainers hold fewer, or the quota of the project is lower.
        """
        for base_model, count in wanted.items():
            trainers = [trainer.info for trainer in self._fleet.trainers(base_model)]
            room = sum(info.max_adapters for info in trainers if info)
            taken = sum(number for (_, model), number in others.items() if model == base_model)
            if trainers and room < taken + count:
                raise _no_room(
                    f"the trainers of {base_model!r} hold {room} adapters", count, room, taken
                )
        quota = self._projects.of(project).max_adapters
        count = sum(wanted.values())
        taken = sum(number for (owner, _), number in others.items() if owner == project)
        if quota is not None and quota < taken + count:
            raise _no_room(f"the project's quota is {quota} adapters", count, quota, taken)

    async def get(self, name: str) -> Job:
        """One job."""
        parse_job(name)
        return self._told(await self._store.get(name))

    async def page(self, parent: str, page_size: int, page_token: str) -> tuple[list[Job], str]:
        """Jobs of a project, newest first, and the token of the next page ("": none)."""
        project = parse_project(parent)
        size = page_size_of(page_size)
        found = await self._store.page(project, limit=size + 1, after=page_token)
        more = len(found) > size
        told = [self._told(job) for job in found[:size]]
        return told, parse_job(told[-1].name)[1] if more else ""

    async def pause(self, name: str) -> Job:
        """Stop a job after the step it is in."""
        return await self._command(name, "pause")

    async def resume(self, name: str) -> Job:
        """Go on with a paused job."""
        return await self._command(name, "resume")

    async def cancel(self, name: str) -> Job:
        """End a job now."""
        return await self._command(name, "cancel")

    async def watch(self, name: str, after_event: int) -> AsyncIterator[JobEvent]:
        """The job's events behind number `after_event`, each once, up to the one that ends it.

        Raises:
            InvalidRequest: the job has no such event yet.
            FailedPrecondition: the next one is kept no longer. From 0 on, it begins with the first
                that is.
            Unavailable: this coordinator is going away; its successor goes on from any event.
        """
        parse_job(name)
        changes, seen = self._store.changes, after_event
        while True:
            changed = changes.next(name)
            page = await self._store.events(name, after=seen)
            if not 0 <= seen <= page.last_event:
                raise InvalidRequest(
                    f"after_event: {after_event} is not one of the events of {name}, which are "
                    f"numbered from 1 to {page.last_event}",
                    field="after_event",
                    value=after_event,
                )
            for event in page.events:
                if seen and event.number != seen + 1:
                    raise _forgotten(name, after_event, first=event.number)
                yield event
                seen = event.number
                if isinstance(event.event, StateChanged) and event.event.to_state in FINAL_STATES:
                    return
            if page.ended and seen >= page.last_event:
                return
            if not page.events:
                if changes.closed:
                    raise Unavailable("the coordinator is going away", resource=name)
                await changed.wait()

    async def _command(self, name: str, command: Command) -> Job:
        parse_job(name)
        return self._told(await self._store.command(name, command, now=self._clock()))

    def _told(self, job: Job) -> Job:
        """With where it stands, if it waits, and what it misses, if it runs."""
        if job.state == "RUNNING":
            problems = [*self._problems(job.name), *self._environment_problems(job.spec)]
            return job.model_copy(update={"problems": problems})
        if job.state == "PENDING":
            return job.model_copy(update={"queue": self._queue(job.name)})
        return job

    def _environment_problems(self, spec: JobSpec) -> list[str]:
        """What is known of its environment before a call of the job has failed there."""
        of_reward = spec.reward.environment if spec.reward else ""
        name = spec.environment.name if spec.environment else of_reward
        status = self._fleet.environment(name) if name else None
        if status is None or status.serving:
            return []
        return [f"the environment {name!r} is away: {status.problem}"]

    def _check_adapter(self, spec: JobSpec) -> None:
        trainers = [trainer.info for trainer in self._fleet.trainers(spec.base_model)]
        samplers = [sampler.info for sampler in self._fleet.samplers(spec.base_model)]
        # Any trainer will do, and every sampler has to.
        ranks = [max(info.max_rank for info in trainers if info)] if trainers else []
        ranks += [info.max_rank for info in samplers if info]
        if ranks and spec.adapter.rank > min(ranks):
            raise InvalidRequest(
                f"adapter.rank: {spec.adapter.rank} is more than the {min(ranks)} that the mesh "
                f"takes for {spec.base_model!r}",
                field="adapter.rank",
                value=spec.adapter.rank,
                allowed=f"1 to {min(ranks)}",
            )
        kept = [max(info.kept_versions for info in trainers if info)] if trainers else []
        if kept and num_versions(spec) > kept[0]:
            raise InvalidRequest(
                f"algorithm.max_staleness: {spec.algorithm.max_staleness} is more than "
                f"{kept[0] - 2}: the trainers keep {kept[0]} versions of an adapter",
                field="algorithm.max_staleness",
                value=spec.algorithm.max_staleness,
                allowed=f"0 to {kept[0] - 2}",
            )
        known = sorted({module for info in trainers if info for module in info.target_modules})
        for module in spec.adapter.target_modules if trainers else ():
            if module not in known:
                raise InvalidRequest(
                    f"adapter.target_modules: {spec.base_model!r} has no {module!r}; it has: "
                    f"{', '.join(known)}",
                    field="adapter.target_modules",
                    value=module,
                    allowed=", ".join(known),
                )

    async def _check_tasks(self, project: str, spec: JobSpec) -> None:
        """Make the tasks, fill the templates, score an empty completion: the job would do the same.

        What only fails later in the job fails the job; what can be seen now is the caller's error.
        """
        info = await self._checks.environment(spec)
        tasks = await self._tasks.training(spec, most_of_split=1)
        held_out = await self._tasks.evaluation(spec, most_of_split=1)
        await asyncio.to_thread(check_templates, spec, [*tasks, *chain(*held_out.values())])
        await self._checks.completions(spec, tasks)
        await self._checks.observations(spec, info, tasks[0])
        await self._checks.reward(project, spec, tasks[0])


def _no_room(why: str, count: int, room: int, taken: int) -> CapacityExhausted:
    shared = f", {taken} of which jobs of other sweeps may need until they end" if taken else ""
    return CapacityExhausted(
        f"{count} jobs that are compared need as many adapters at once, and {why}{shared}",
        value=count,
        allowed=max(0, room - taken),
    )


def _forgotten(name: str, after_event: int, *, first: int) -> FailedPrecondition:
    return FailedPrecondition(
        f"after_event: the events of {name} before {first} are kept no longer, so those after "
        f"{after_event} are not all there",
        field="after_event",
        value=after_event,
        first_event=first,
    )


def _request(project: str, request_id: str, job_id: str, spec: JobSpec) -> Request:
    return Request.of(project, request_id, "CreateJob", job_id, spec.model_dump(mode="json"))


def num_versions(spec: JobSpec) -> int:
    """Versions of a job's adapter that its trainer has to keep: those sampled, and two newer."""
    return spec.algorithm.max_staleness + 2


def lora_of(spec: AdapterSpec) -> LoraConfig:
    """The adapter of a job."""
    return LoraConfig(
        rank=spec.rank,
        alpha=spec.alpha,
        target_modules=tuple(spec.target_modules),
        seed=spec.seed,
    )
