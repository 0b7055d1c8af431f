"""Sweeps. A comparison, and all that follows from it for the jobs, are one transaction."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, insert, select, update

from rollmesh.errors import AlreadyExists, InvalidRequest
from rollmesh.job import FINAL_STATES
from rollmesh.names import sweep_name
from services.coordinator.halving import Contestant, compare
from services.coordinator.store import requests
from services.coordinator.store.job_moves import apply
from services.coordinator.store.jobs import QUEUE
from services.coordinator.store.new_jobs import add, check_room
from services.coordinator.store.sweep_rows import (
    SELECT,
    brief_sweep,
    entrants,
    note_verdict,
    nothing_under_way,
    row_of,
    sweep_of,
)
from services.coordinator.store.tables import jobs, sweep_jobs, sweeps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from rollmesh.sweep import Sweep, SweepSpec
    from services.coordinator.lifecycle import Command
    from services.coordinator.store.changes import Changes
    from services.coordinator.store.database import Database
    from services.coordinator.store.new_jobs import NewJob
    from services.coordinator.store.requests import Request
    from services.coordinator.store.sweep_rows import Entrant


class SweepStore:
    """The tables `sweeps` and `sweep_jobs`. `changes` wakes who waits for their jobs."""

    def __init__(self, database: Database, changes: Changes, request_retention_s: float) -> None:
        self._database = database
        self._changes = changes
        self._request_retention_s = request_retention_s

    async def find_request(self, request: Request) -> str | None:
        """Name of the sweep that `request` made before; None: it is new."""
        async with self._database.read() as connection:
            return await requests.find(connection, request)

    async def create(
        self,
        name: str,
        project: str,
        spec: SweepSpec,
        new_jobs: Sequence[tuple[Mapping[str, Any], NewJob]],
        *,
        request: Request,
        max_pending: int,
        now: float,
    ) -> Sweep:
        """A new sweep with all of its jobs, each with its values; or what `request` made before.

        Raises:
            AlreadyExists: the name, a job's or an adapter's is taken, or the request_id.
            Overloaded: more than `max_pending` jobs would wait.
        """
        brief = brief_sweep(spec).model_dump_json(exclude_unset=True)

        async def work(connection: AsyncConnection) -> Sweep:
            made = await requests.find(connection, request)
            if made is not None:
                return await _sweep(connection, made)
            found = await connection.execute(select(sweeps.c.id).where(sweeps.c.name == name))
            if found.first() is not None:
                raise AlreadyExists(f"there is a {name} already", field="sweep_id", resource=name)
            row = await connection.execute(
                insert(sweeps)
                .values(
                    name=name,
                    project=project,
                    phase="RUNNING",
                    brief_spec=brief,
                    halving=spec.halving is not None,
                    create_time=now,
                )
                .returning(sweeps.c.id)
            )
            sweep_id = row.scalar_one()
            for number, (point, new) in enumerate(new_jobs):
                # Megabytes each, which SQLite writes on the event loop: others have a turn between.
                await asyncio.sleep(0)
                await add(connection, new, now=now, sweep=name)
                await connection.execute(
                    insert(sweep_jobs).values(
                        sweep_id=sweep_id,
                        number=number,
                        job=new.name,
                        point=json.dumps(dict(point)),
                        rung=0,
                        halved=False,
                        reward_count=0,
                        reward_sum=0.0,
                    )
                )
            await check_room(connection, max_pending=max_pending)
            await requests.remember(
                connection, request, name, now=now, retention_s=self._request_retention_s
            )
            return await _sweep(connection, name)

        try:
            return await self._database.transact(work)
        finally:
            self._changes.wake(QUEUE)

    async def get(self, name: str) -> Sweep:
        """One sweep with its jobs."""
        async with self._database.read() as connection:
            return await _sweep(connection, name)

    async def page(self, project: str, *, limit: int, after: str) -> list[Sweep]:
        """Sweeps of a project without their jobs, newest first, from behind that with id `after`.

        Raises:
            InvalidRequest: there is no sweep `after`.
        """
        query = SELECT.where(sweeps.c.project == project)
        async with self._database.read() as connection:
            if after:
                named = sweeps.c.name == sweep_name(project, after)
                last = await connection.execute(select(sweeps.c.id).where(named))
                last_id = last.scalar_one_or_none()
                if last_id is None:
                    raise InvalidRequest(
                        f"page_token: {after!r} was not answered by ListSweeps",
                        field="page_token",
                        value=after,
                    )
                query = query.where(sweeps.c.id < last_id)
            rows = await connection.execute(query.order_by(sweeps.c.id.desc()).limit(limit))
            return [sweep_of(row) for row in rows]

    async def cancel(self, name: str, *, now: float) -> Sweep:
        """Cancel its jobs that have not ended; a sweep that has ended is left as it is."""
        cancelled: list[str] = []

        async def work(connection: AsyncConnection) -> Sweep:
            cancelled.clear()
            row = await row_of(connection, name, lock=True)
            if not row.goes_on:
                return await _sweep(connection, name)
            for entrant in _left(await entrants(connection, row, lock=True)):
                reason = "its sweep was cancelled"
                await apply(connection, entrant.job, "cancel", now=now, reason=reason)
                cancelled.append(entrant.job)
            await _end(connection, row, "CANCELLED")
            return await _sweep(connection, name)

        try:
            return await self._database.transact(work)
        finally:
            self._changes.wake(QUEUE, *cancelled)

    async def comparing(self) -> dict[tuple[str, str], int]:
        """Jobs that have not ended of running sweeps with halving, by project and base model."""
        query = (
            select(jobs.c.project, jobs.c.base_model, func.count())
            .join_from(jobs, sweeps, jobs.c.sweep == sweeps.c.name)
            .where(sweeps.c.phase == "RUNNING", sweeps.c.halving)
            .where(jobs.c.phase.notin_(FINAL_STATES))
            .group_by(jobs.c.project, jobs.c.base_model)
        )
        async with self._database.read() as connection:
            rows = await connection.execute(query)
            return {(project, base_model): count for project, base_model, count in rows}

    async def due(self) -> list[str]:
        """Names of running sweeps of which every job has ended or is held."""
        query = select(sweeps.c.name).where(sweeps.c.phase == "RUNNING", nothing_under_way())
        async with self._database.read() as connection:
            return list(await connection.scalars(query.order_by(sweeps.c.id)))

    async def settle(self, name: str, *, now: float) -> None:
        """Compare the jobs of a sweep and do what comes of it, or end it: whatever it is due for.

        It can be called at any time and any number of times.
        """
        moved: list[str] = []

        async def work(connection: AsyncConnection) -> None:
            moved.clear()
            row = await row_of(connection, name, lock=True)
            everyone = {one.number: one for one in await entrants(connection, row, lock=True)}
            if not _left(list(everyone.values())):
                if row.phase == "RUNNING":
                    await _end(connection, row, "ENDED")
                return
            halving = sweep_of(row).spec.halving
            if halving is None:
                return
            contestants = [
                Contestant(one.number, one.phase, one.rung, one.metric) for one in everyone.values()
            ]
            for verdict in compare(halving, contestants):
                job = everyone[verdict.number].job
                command: Command = "release" if verdict.goes_on else "cancel"
                await apply(connection, job, command, now=now, reason=verdict.reason)
                await note_verdict(connection, everyone[verdict.number], goes_on=verdict.goes_on)
                moved.append(job)

        try:
            await self._database.transact(work)
        finally:
            if moved:
                self._changes.wake(QUEUE, *moved)


async def _sweep(connection: AsyncConnection, name: str) -> Sweep:
    row = await row_of(connection, name)
    return sweep_of(row, await entrants(connection, row))


def _left(everyone: Sequence[Entrant]) -> list[Entrant]:
    return [one for one in everyone if one.phase not in FINAL_STATES]


async def _end(connection: AsyncConnection, row: Row[Any], phase: str) -> None:
    await connection.execute(update(sweeps).where(sweeps.c.id == row.id).values(phase=phase))
