"""Rows of `sweeps` and `sweep_jobs`, and of their jobs, to and from what they mean."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import select, update

from rollmesh.errors import NotFound
from rollmesh.job import FINAL_STATES
from rollmesh.sweep import Sweep, SweepJob, SweepSpec, SweepState
from services.coordinator.halving import rung_step
from services.coordinator.lifecycle import state_of
from services.coordinator.store.job_rows import brief_spec
from services.coordinator.store.tables import jobs, sweep_jobs, sweeps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement, Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from rollmesh.job import StepCompleted
    from services.coordinator.lifecycle import Phase

# Correlated: whether some job of the sweep has not ended.
_GOES_ON = (
    select(jobs.c.id)
    .where(jobs.c.sweep == sweeps.c.name, jobs.c.phase.notin_(FINAL_STATES))
    .exists()
)
SELECT = select(sweeps, _GOES_ON.label("goes_on"))


def nothing_under_way() -> ColumnElement[bool]:
    """Whether every job of the sweep has ended or is held."""
    out = (*FINAL_STATES, "HELD")
    return ~(
        select(jobs.c.id).where(jobs.c.sweep == sweeps.c.name, jobs.c.phase.notin_(out)).exists()
    )


@dataclass(frozen=True, slots=True)
class Entrant:
    """A job of a sweep as both of its rows tell it."""

    number: int
    job: str
    values: dict[str, Any]
    phase: Phase
    state_reason: str
    step: int
    rung: int
    halved: bool
    metric: float | None
    compared: float | None

    @property
    def shown(self) -> float | None:
        """Until there is a figure since the last comparison, what that went by."""
        return self.compared if self.metric is None else self.metric


def brief_sweep(spec: SweepSpec) -> SweepSpec:
    """`spec` with only the first task of each dataset."""
    return spec.model_copy(update={"base": brief_spec(spec.base)})


async def row_of(connection: AsyncConnection, name: str, *, lock: bool = False) -> Row[Any]:
    """The sweep's row, and whether it `goes_on`. NotFound: there is none of that name."""
    query = SELECT.where(sweeps.c.name == name)
    found = await connection.execute(query.with_for_update(of=sweeps) if lock else query)
    row = found.one_or_none()
    if row is None:
        raise NotFound(f"there is no {name}", resource=name)
    return row


def sweep_of(row: Row[Any], entrants: Sequence[Entrant] = ()) -> Sweep:
    """The sweep that a row of SELECT tells, its jobs the best first."""
    state: SweepState = "RUNNING" if row.goes_on else "ENDED"
    return Sweep(
        name=row.name,
        spec=SweepSpec.model_validate_json(row.brief_spec),
        state="CANCELLED" if row.phase == "CANCELLED" else state,
        create_time=row.create_time,
        jobs=[_told(entrant) for entrant in sorted(entrants, key=_best_first)],
    )


def _best_first(entrant: Entrant) -> tuple[int, bool, float, int]:
    # Who has survived more comparisons was better at each of them.
    shown = entrant.shown
    return -entrant.rung, shown is None, -(shown or 0.0), entrant.number


def _told(entrant: Entrant) -> SweepJob:
    return SweepJob(
        job=entrant.job,
        values=entrant.values,
        state=state_of(entrant.phase),
        state_reason=entrant.state_reason,
        step=entrant.step,
        metric=entrant.shown,
        rung=entrant.rung,
        halved=entrant.halved,
    )


async def entrants(
    connection: AsyncConnection, sweep: Row[Any], *, lock: bool = False
) -> list[Entrant]:
    """The jobs of a sweep by number, and their figures; with `lock` they stay as they are."""
    query = _jobs_of(sweep.id)
    rows = (await connection.execute(query.with_for_update(of=jobs) if lock else query)).all()
    spec = SweepSpec.model_validate_json(sweep.brief_spec)
    by_reward = spec.halving is not None and spec.halving.metric == "reward"
    return [
        Entrant(
            number=row.number,
            job=row.job,
            values=json.loads(row.point),
            phase=row.phase,
            state_reason=row.state_reason,
            step=row.step,
            rung=row.rung,
            halved=row.halved,
            metric=_mean_reward(row) if by_reward else _newest(row),
            compared=row.compared,
        )
        for row in rows
    ]


def _jobs_of(sweep_id: int) -> Select[Any]:
    columns = (
        jobs.c.id,
        jobs.c.phase,
        jobs.c.state_reason,
        jobs.c.step,
        jobs.c.metrics,
        jobs.c.last_evaluation,
    )
    return (
        select(sweep_jobs, *columns)
        .join_from(sweep_jobs, jobs, sweep_jobs.c.job == jobs.c.name)
        .where(sweep_jobs.c.sweep_id == sweep_id)
        .order_by(sweep_jobs.c.number)
    )


def _newest(row: Row[Any]) -> float | None:
    """The newest evaluation, or, where nothing is evaluated, the newest step's mean reward."""
    if row.last_evaluation is not None:
        return _finite(json.loads(row.last_evaluation)["reward_mean"])
    return _finite(json.loads(row.metrics).get("reward_mean"))


async def add_reward(connection: AsyncConnection, job: Row[Any], step: StepCompleted) -> None:
    """Add the mean reward of a step to what its job is compared by next."""
    reward = _finite(step.metrics.get("reward_mean"))
    if job.sweep is None or reward is None:
        return
    added = {
        "reward_count": sweep_jobs.c.reward_count + 1,
        "reward_sum": sweep_jobs.c.reward_sum + reward,
    }
    await connection.execute(update(sweep_jobs).where(sweep_jobs.c.job == job.name).values(**added))


async def note_verdict(connection: AsyncConnection, entrant: Entrant, *, goes_on: bool) -> None:
    """What a comparison made of a job, and by which figure; its rewards count from here on."""
    values = {
        "rung": entrant.rung + goes_on,
        "halved": not goes_on,
        "compared": entrant.metric,
        "reward_count": 0,
        "reward_sum": 0.0,
    }
    await connection.execute(
        update(sweep_jobs).where(sweep_jobs.c.job == entrant.job).values(**values)
    )


def _mean_reward(row: Row[Any]) -> float | None:
    """Over the steps since the comparison before."""
    return row.reward_sum / row.reward_count if row.reward_count else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


async def hold_step(connection: AsyncConnection, job: str, sweep: str | None) -> int | None:
    """The step at which `job` waits for the others of its sweep; None: at none."""
    if sweep is None:
        return None
    row = await row_of(connection, sweep)
    halving = SweepSpec.model_validate_json(row.brief_spec).halving
    if halving is None:
        return None
    others = select(jobs.c.id).where(
        jobs.c.sweep == sweep, jobs.c.name != job, jobs.c.phase.notin_(FINAL_STATES)
    )
    if (await connection.execute(others.limit(1))).first() is None:
        return None  # Nobody is left to compare it with.
    found = await connection.execute(select(sweep_jobs.c.rung).where(sweep_jobs.c.job == job))
    return rung_step(halving, found.scalar_one())
