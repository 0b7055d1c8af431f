"""Jobs as they begin: one row each, with an adapter reserved and a first event."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from sqlalchemy import func, insert, select

from rollmesh.errors import AlreadyExists, Overloaded
from rollmesh.job import JobSpec, StateChanged
from services.coordinator.store.adapter_rows import reserve
from services.coordinator.store.job_rows import append, brief_spec, exists, row_of
from services.coordinator.store.leases import hold_for_job
from services.coordinator.store.tables import jobs

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from rollmesh import types


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job that is to be stored: what it takes of JobStore.create, and its spec as JSON.

    `full` has all tasks, `brief` the first of each dataset.
    """

    name: str
    project: str
    spec: JobSpec
    adapter: str
    lora: types.LoraConfig
    full: str
    brief: str

    @classmethod
    async def of(
        cls, name: str, project: str, spec: JobSpec, *, adapter: str, lora: types.LoraConfig
    ) -> Self:
        """Megabytes of tasks become text beside the event loop."""
        full = await asyncio.to_thread(spec.model_dump_json)
        brief = brief_spec(spec).model_dump_json()
        return cls(name, project, spec, adapter, lora, full, brief)


async def check_room(connection: AsyncConnection, *, max_pending: int) -> None:
    """Raise Overloaded where more than `max_pending` jobs wait, those just added included."""
    found = await connection.execute(
        select(func.count()).select_from(jobs).where(jobs.c.phase == "PENDING")
    )
    waiting = found.scalar_one()
    if waiting > max_pending:
        raise Overloaded(
            f"{waiting} jobs would wait, and max_pending_jobs is {max_pending}", limit=max_pending
        )


async def add(
    connection: AsyncConnection, new: NewJob, *, now: float, sweep: str | None = None
) -> None:
    """Store a PENDING job, of the sweep of that name if any, and reserve its adapter.

    The version of its teacher is held from now on, and the first thing that its loop remembers.

    Raises:
        AlreadyExists: its name or the adapter's is taken.
        NotFound: its teacher is gone, or that version of it.
    """
    if await exists(connection, new.name):
        raise AlreadyExists(f"there is a {new.name} already", field="job_id", resource=new.name)
    memory = await _with_teacher(connection, new)
    await connection.execute(
        insert(jobs).values(
            name=new.name,
            project=new.project,
            phase="PENDING",
            state_reason="",
            base_model=new.spec.base_model,
            spec=new.full,
            brief_spec=new.brief,
            create_time=now,
            update_time=now,
            adapter="",
            step=0,
            metrics="{}",
            last_event=0,
            priority=new.spec.priority,
            memory=json.dumps(memory),
            best_checkpoint="",
            sweep=sweep,
            needs_sampler=new.spec.needs_sampler,
        )
    )
    await reserve(connection, new.adapter, new.spec.base_model, new.lora, job=new.name, now=now)
    row = await row_of(connection, new.name)
    await append(connection, row, StateChanged(from_state=None, to_state="PENDING"), now=now)


async def _with_teacher(connection: AsyncConnection, new: NewJob) -> dict[str, Any]:
    """What services/coordinator/teacher.py knows its policy again by."""
    distillation = new.spec.distillation
    if distillation is None or not distillation.teacher_adapter:
        return {}
    base_model, version = await hold_for_job(
        connection, new.name, distillation.teacher_adapter, distillation.teacher_version
    )
    return {
        "teacher": {
            "base_model": base_model,
            "policy_version": version.policy_version,
            "digest": version.digest,
        }
    }
