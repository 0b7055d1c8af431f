"""The events of jobs that have ended long ago, of which only the last is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import delete, select, tuple_

from rollmesh.job import FINAL_STATES
from services.coordinator.store.tables import job_events, jobs

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.coordinator.store.database import Database

_KEY = (job_events.c.job_id, job_events.c.number)
_AT_ONCE = 1000
"""Rows of one transaction: nobody else waits for longer than they take."""


class EventStore:
    """The table `job_events`; JobStore writes and reads it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def drop_of_ended(self, before: float) -> int:
        """Let go of some of those of jobs that ended before that time, and how many they were.

        0: there are none left but the last of each, which says how the job ended.
        """
        old = (
            select(*_KEY)
            .join(jobs, jobs.c.id == job_events.c.job_id)
            .where(
                jobs.c.phase.in_(FINAL_STATES),
                jobs.c.update_time < before,
                job_events.c.number < jobs.c.last_event,
            )
            # What is left has no gaps.
            .order_by(*_KEY)
            .limit(_AT_ONCE)
        )

        async def work(connection: AsyncConnection) -> int:
            dropped = await connection.execute(delete(job_events).where(tuple_(*_KEY).in_(old)))
            return dropped.rowcount

        return await self._database.transact(work)
