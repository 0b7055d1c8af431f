"""Commands to a job within a transaction, whoever else's rows it changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import update

from rollmesh.job import FINAL_STATES, StateChanged
from services.coordinator.lifecycle import move, state_of
from services.coordinator.store.groups import abandon
from services.coordinator.store.job_rows import append, row_of
from services.coordinator.store.leases import release_of_job
from services.coordinator.store.tables import jobs

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.coordinator.lifecycle import Command


async def apply(
    connection: AsyncConnection, name: str, command: Command, *, now: float, reason: str = ""
) -> None:
    """Move the job as `lifecycle` says, and tell it as an event.

    Raises:
        NotFound: no such job.
        FailedPrecondition: its phase does not allow that.
    """
    row = await row_of(connection, name, lock=True)
    moved = move(name, command, row.phase)
    if moved is None:
        return
    why = reason or moved.reason
    await connection.execute(
        update(jobs)
        .where(jobs.c.id == row.id)
        .values(phase=moved.to, state_reason=why, update_time=now)
    )
    if moved.to in FINAL_STATES:
        await abandon(connection, row.id)
        await release_of_job(connection, name, now=now)
    from_state, to_state = state_of(row.phase), state_of(moved.to)
    if from_state != to_state:
        changed = StateChanged(from_state=from_state, to_state=to_state, reason=why)
        await append(connection, row, changed, now=now)
