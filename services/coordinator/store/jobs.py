"""Jobs and their events. Every change of a job and the event that tells it are one transaction."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from sqlalchemy import select, update

from rollmesh.errors import FailedPrecondition, InvalidRequest
from rollmesh.job import (
    FINAL_STATES,
    AlgorithmSpec,
    Happening,
    Job,
    JobEvent,
    JobSpec,
    Priority,
    StepCompleted,
)
from rollmesh.names import job_name
from services.coordinator.lifecycle import state_of
from services.coordinator.store import requests
from services.coordinator.store.groups import release
from services.coordinator.store.job_moves import apply
from services.coordinator.store.job_rows import (
    SHOWN,
    append,
    consequences,
    job_of,
    row_of,
)
from services.coordinator.store.new_jobs import NewJob, add, check_room
from services.coordinator.store.sweep_rows import add_reward, hold_step
from services.coordinator.store.tables import adapters, job_events, jobs

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.coordinator.lifecycle import Command, Phase
    from services.coordinator.store.changes import Changes
    from services.coordinator.store.database import Database
    from services.coordinator.store.requests import Request

QUEUE = "queue"
"""Topic of changes in which jobs run, may run or should stop; a job's own topic is its name."""
_EVENTS_A_READ = 256
_HAPPENING: TypeAdapter[Happening] = TypeAdapter(Happening)


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job that has not ended and is not paused.

    `has_adapter`: its own is made, or being made: it counts already.
    """

    name: str
    base_model: str
    phase: Phase
    state_reason: str
    project: str
    priority: Priority
    create_time: float
    step: int
    has_adapter: bool
    needs_sampler: bool


@dataclass(frozen=True, slots=True)
class StoredJob:
    """All that running a job takes, but its groups: `spec` has every task.

    `hold_step` and `memory` as in JobContext.
    """

    job: Job
    spec: JobSpec
    hold_step: int | None = None
    memory: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EventPage:
    """Some events of a job; its last event and whether it had ended when they were read."""

    events: list[JobEvent]
    last_event: int
    ended: bool


class JobStore:
    """The tables `jobs` and `job_events`. `changes` wakes who waits for a job or the queue."""

    def __init__(
        self,
        database: Database,
        changes: Changes,
        request_retention_s: float,
        rollout_retention_s: float,
    ) -> None:
        self._database = database
        self._request_retention_s = request_retention_s
        self._rollout_retention_s = rollout_retention_s
        self.changes = changes

    async def find_request(self, request: Request) -> str | None:
        """Name of the job that `request` made before; None: it is new."""
        async with self._database.read() as connection:
            return await requests.find(connection, request)

    async def create(self, new: NewJob, *, request: Request, max_pending: int, now: float) -> Job:
        """A new PENDING job, or the one that `request` made before; its adapter is reserved for it.

        Raises:
            AlreadyExists: the name, the adapter's or the request_id is taken.
            Overloaded: `max_pending` jobs wait already.
        """

        async def work(connection: AsyncConnection) -> Job:
            made = await requests.find(connection, request)
            if made is not None:
                return job_of(await row_of(connection, made))
            await add(connection, new, now=now)
            await check_room(connection, max_pending=max_pending)
            await requests.remember(
                connection, request, new.name, now=now, retention_s=self._request_retention_s
            )
            return job_of(await row_of(connection, new.name))

        return await self._change(new.name, work)

    async def get(self, name: str) -> Job:
        """One job, its spec with the first task of each dataset only."""
        async with self._database.read() as connection:
            return job_of(await row_of(connection, name))

    async def load(self, name: str) -> StoredJob:
        """One job with all its tasks."""
        async with self._database.read() as connection:
            row = await row_of(connection, name)
            large = (
                await connection.execute(
                    select(jobs.c.spec, jobs.c.memory).where(jobs.c.name == name)
                )
            ).one()
            hold = await hold_step(connection, name, row.sweep)
        # Megabytes of tasks would hold up everybody else.
        spec = await asyncio.to_thread(JobSpec.model_validate_json, large.spec)
        memory = await asyncio.to_thread(json.loads, large.memory)
        return StoredJob(job_of(row), spec, hold, memory)

    async def page(self, project: str, *, limit: int, after: str) -> list[Job]:
        """Jobs of a project, newest first, from the one behind the job with id `after` ("": all).

        Raises:
            InvalidRequest: there is no job `after`.
        """
        query = select(*SHOWN).where(jobs.c.project == project)
        async with self._database.read() as connection:
            if after:
                last = await connection.execute(
                    select(jobs.c.id).where(jobs.c.name == job_name(project, after))
                )
                last_id = last.scalar_one_or_none()
                if last_id is None:
                    raise InvalidRequest(
                        f"page_token: {after!r} was not answered by ListJobs",
                        field="page_token",
                        value=after,
                    )
                query = query.where(jobs.c.id < last_id)
            rows = await connection.execute(query.order_by(jobs.c.id.desc()).limit(limit))
            return [job_of(row) for row in rows]

    async def queue(self) -> list[QueuedJob]:
        """Jobs that run or wait to: those that were running first, then in the order of creation.

        As many as max_pending_jobs and max_running_jobs allow.
        """
        has_adapter = jobs.c.name.in_(
            select(adapters.c.job).where(adapters.c.counts, adapters.c.job.is_not(None))
        )
        query = (
            select(
                jobs.c.name,
                jobs.c.base_model,
                jobs.c.phase,
                jobs.c.state_reason,
                jobs.c.project,
                jobs.c.priority,
                jobs.c.create_time,
                jobs.c.step,
                has_adapter.label("has_adapter"),
                jobs.c.needs_sampler,
            )
            .where(jobs.c.phase.in_(("PENDING", "RUNNING", "PAUSING")))
            .order_by((jobs.c.phase == "PENDING"), jobs.c.id)
        )
        async with self._database.read() as connection:
            return [QueuedJob(*row) for row in await connection.execute(query)]

    async def command(self, name: str, command: Command, *, now: float, reason: str = "") -> Job:
        """Move the job as `lifecycle` says; the job after it.

        Raises:
            NotFound: no such job.
            FailedPrecondition: its phase does not allow that.
        """

        async def work(connection: AsyncConnection) -> Job:
            await apply(connection, name, command, now=now, reason=reason)
            return job_of(await row_of(connection, name))

        return await self._change(name, work)

    async def explain(self, name: str, reason: str, *, now: float) -> None:
        """Say what a job waits for, without an event."""

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(
                update(jobs)
                .where(jobs.c.name == name, jobs.c.phase.in_(("PENDING", "RUNNING")))
                .values(state_reason=reason, update_time=now)
            )

        await self._database.transact(work)

    async def record(
        self,
        name: str,
        happening: Happening,
        *,
        now: float,
        memory: Mapping[str, Any] | None = None,
    ) -> bool:
        """The next event of a running job, and what follows from it; whether it is to pause.

        `memory`: what its loop is to know from then on; None: what it knew.

        Raises:
            FailedPrecondition: the job does not run (any more): its last event stays its last.
        """

        async def work(connection: AsyncConnection) -> bool:
            row = await row_of(connection, name, lock=True)
            if state_of(row.phase) != "RUNNING":
                raise FailedPrecondition(
                    f"{name} does not run, its state is {row.phase}", resource=name, state=row.phase
                )
            values = {"update_time": now, **consequences(happening, row)}
            if memory is not None:
                values["memory"] = json.dumps(memory)
                # What its border keeps is shown with the job.
                values["best_checkpoint"] = memory.get("border", {}).get("checkpoint", "")
            await connection.execute(update(jobs).where(jobs.c.id == row.id).values(**values))
            if isinstance(happening, StepCompleted):
                await add_reward(connection, row, happening)
                algorithm = AlgorithmSpec.model_validate(json.loads(row.brief_spec)["algorithm"])
                await release(
                    connection,
                    row.id,
                    before_number=happening.step * algorithm.groups_per_step,
                    retention_s=self._rollout_retention_s,
                    now=now,
                )
            await append(connection, row, happening, now=now)
            pausing: bool = row.phase == "PAUSING"
            return pausing

        try:
            return await self._database.transact(work)
        finally:
            self.changes.wake(name)

    async def events(self, name: str, *, after: int) -> EventPage:
        """The events behind number `after`, a few hundred at most."""
        async with self._database.read() as connection:
            # The job first: where it has ended, its last event is there to be read.
            row = await row_of(connection, name, jobs.c.id, jobs.c.phase, jobs.c.last_event)
            found = await connection.execute(
                select(job_events)
                .where(job_events.c.job_id == row.id, job_events.c.number > after)
                .order_by(job_events.c.number)
                .limit(_EVENTS_A_READ)
            )
            events = [
                JobEvent(
                    number=event.number,
                    time=event.time,
                    event=_HAPPENING.validate_python(json.loads(event.event)),
                )
                for event in found
            ]
        return EventPage(events, row.last_event, ended=row.phase in FINAL_STATES)

    async def _change(self, name: str, work: Callable[[AsyncConnection], Awaitable[Job]]) -> Job:
        try:
            return await self._database.transact(work)
        finally:
            # Also when cancelled: the commit may have come first.
            self.changes.wake(name, QUEUE)
