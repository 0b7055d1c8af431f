"""Rows of the tables `jobs` and `job_events`, to and from what they mean."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sqlalchemy import insert, select, update

from rollmesh.errors import NotFound
from rollmesh.job import DatasetSpec, EvaluationCompleted, Job, JobSpec, StepCompleted
from services.coordinator.evaluation import is_better
from services.coordinator.lifecycle import state_of
from services.coordinator.store.tables import job_events, jobs

if TYPE_CHECKING:
    from sqlalchemy import Column, Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from rollmesh.job import Happening


def brief_spec(spec: JobSpec) -> JobSpec:
    """`spec` with only the first task of each dataset."""
    updates: dict[str, Any] = {"dataset": _first_task(spec.dataset)}
    if spec.evaluation is not None:
        held_out = _first_task(spec.evaluation.dataset)
        sets = [
            one.model_copy(update={"dataset": _first_task(one.dataset)})
            for one in spec.evaluation.sets
        ]
        updates["evaluation"] = spec.evaluation.model_copy(
            update={"dataset": held_out, "sets": sets}
        )
    return spec.model_copy(update=updates)


def _first_task(dataset: DatasetSpec) -> DatasetSpec:
    return dataset.model_copy(update={"tasks": dataset.tasks[:1]})


# All but what may be large: the spec with all its tasks, and what its loop knows.
SHOWN = [column for column in jobs.columns if column.name not in {"spec", "memory"}]


async def row_of(
    connection: AsyncConnection, name: str, *columns: Column[Any], lock: bool = False
) -> Row[Any]:
    """Columns of the job's row; without any, all that is shown."""
    query = select(*(columns or SHOWN)).where(jobs.c.name == name)
    row = (await connection.execute(query.with_for_update() if lock else query)).one_or_none()
    if row is None:
        raise NotFound(f"there is no {name}", resource=name)
    return row


async def exists(connection: AsyncConnection, name: str) -> bool:
    """Whether there is a job of that name."""
    found = await connection.execute(select(jobs.c.id).where(jobs.c.name == name))
    return found.first() is not None


async def append(
    connection: AsyncConnection, row: Row[Any], happening: Happening, *, now: float
) -> None:
    """The next event of the job whose row is held: numbers have no gaps."""
    number = row.last_event + 1
    text = json.dumps(happening.model_dump(mode="json"))
    await connection.execute(
        insert(job_events).values(job_id=row.id, number=number, time=now, event=text)
    )
    await connection.execute(update(jobs).where(jobs.c.id == row.id).values(last_event=number))


def consequences(happening: Happening, row: Row[Any]) -> dict[str, Any]:
    """What an event changes in its job, by column."""
    match happening:
        case StepCompleted():
            return {"step": happening.step, "metrics": json.dumps(happening.metrics)}
        case EvaluationCompleted():
            return _evaluated(happening, row)
        case _:
            return {}


def _evaluated(evaluation: EvaluationCompleted, row: Row[Any]) -> dict[str, Any]:
    if evaluation.set:
        return {}
    text = json.dumps(evaluation.model_dump(mode="json"))
    min_improvement = json.loads(row.brief_spec)["stop"].get("min_improvement", 0.0)
    better = is_better(evaluation, _evaluation(row.best_evaluation), min_improvement)
    return {
        "first_evaluation": row.first_evaluation or text,
        "last_evaluation": text,
        "best_evaluation": text if better else row.best_evaluation,
    }


def job_of(row: Row[Any]) -> Job:
    """The job that the columns SHOWN tell."""
    spec = JobSpec.model_validate_json(row.brief_spec)
    return Job(
        name=row.name,
        spec=spec,
        state=state_of(row.phase),
        state_reason=row.state_reason,
        create_time=row.create_time,
        update_time=row.update_time,
        adapter=row.adapter,
        step=row.step,
        metrics=json.loads(row.metrics),
        first_evaluation=_evaluation(row.first_evaluation),
        last_evaluation=_evaluation(row.last_evaluation),
        last_event=row.last_event,
        best_evaluation=_evaluation(row.best_evaluation),
        best_checkpoint=row.best_checkpoint,
        sweep=row.sweep or "",
    )


def _evaluation(text: str | None) -> EvaluationCompleted | None:
    return None if text is None else EvaluationCompleted.model_validate(json.loads(text))
