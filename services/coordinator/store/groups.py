"""Finished groups of jobs: what a successor does not sample again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import delete, insert, select, tuple_, update

from rollmesh.errors import FailedPrecondition
from services.coordinator.lifecycle import state_of
from services.coordinator.store.job_rows import row_of
from services.coordinator.store.tables import job_groups, jobs

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.coordinator.store.database import Database

_AT_ONCE = 200
"""Rows that are let go of in one transaction: their bodies may be large."""


class GroupStore:
    """The table `job_groups`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def keep(self, job: str, number: int, body: bytes, *, now: float) -> None:
        """The group of that number, instead of what was kept under it.

        Raises:
            FailedPrecondition: the job does not run (any more): nobody would let go of it.
        """

        async def work(connection: AsyncConnection) -> None:
            # Held, for the job not to end in between.
            row = await row_of(connection, job, jobs.c.id, jobs.c.phase, lock=True)
            if state_of(row.phase) != "RUNNING":
                raise FailedPrecondition(
                    f"{job} does not run, its state is {row.phase}", resource=job, state=row.phase
                )
            key = {"job_id": row.id, "number": number}
            await connection.execute(delete(job_groups).filter_by(**key))
            await connection.execute(insert(job_groups).values(**key, body=body, create_time=now))

        await self._database.transact(work)

    async def waiting(self, job: str) -> dict[int, bytes]:
        """Those of a job that wait for their step, by number."""
        query = (
            select(job_groups.c.number, job_groups.c.body)
            .join(jobs, jobs.c.id == job_groups.c.job_id)
            .where(jobs.c.name == job, job_groups.c.trained_time.is_(None))
            .order_by(job_groups.c.number)
        )
        async with self._database.read() as connection:
            return {row.number: row.body for row in await connection.execute(query)}

    async def drop_trained(self, before: float) -> int:
        """Let go of some that were trained before that time (Unix seconds); how many they were.

        0: there are none left.
        """
        key = (job_groups.c.job_id, job_groups.c.number)
        old = select(*key).where(job_groups.c.trained_time < before).limit(_AT_ONCE)

        async def work(connection: AsyncConnection) -> int:
            dropped = await connection.execute(delete(job_groups).where(tuple_(*key).in_(old)))
            return dropped.rowcount

        return await self._database.transact(work)


async def release(
    connection: AsyncConnection, job_id: int, *, before_number: int, retention_s: float, now: float
) -> None:
    """A job's groups before that number are trained: kept for `retention_s`, by drop_trained."""
    trained = (
        job_groups.c.job_id == job_id,
        job_groups.c.number < before_number,
        job_groups.c.trained_time.is_(None),
    )
    if retention_s:
        await connection.execute(update(job_groups).where(*trained).values(trained_time=now))
    else:
        await connection.execute(delete(job_groups).where(*trained))


async def abandon(connection: AsyncConnection, job_id: int) -> None:
    """The job has ended: what it kept for its next steps is nobody's."""
    await connection.execute(
        delete(job_groups).where(job_groups.c.job_id == job_id, job_groups.c.trained_time.is_(None))
    )
