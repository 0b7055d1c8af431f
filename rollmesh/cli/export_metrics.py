"""A job's metrics to where a researcher looks at them: `rollmesh job export-metrics`."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import typer

from rollmesh.cli.follow import ConnectionLost, follow
from rollmesh.cli.view import lost_text
from rollmesh.errors import InvalidRequest
from rollmesh.job import FINAL_STATES

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from rollmesh.cli.sinks import Sink
    from rollmesh.client import JobClient
    from rollmesh.job import Job, JobEvent

_AT_ONCE = 50
"""Events that a sink takes at a time, as long as there are that many already."""


async def export_metrics(
    jobs: JobClient,
    name: str,
    *,
    tensorboard: Path | None,
    mlflow: str,
    wandb: str,
    follow_it: bool,
) -> None:
    """Write what each of the sinks lacks, up to the newest event or the one that ends the job.

    Raises:
        InvalidRequest: there is no sink.
        FailedPrecondition: a sink's package is missing, or it fails.
    """
    if not (tensorboard or mlflow or wandb):
        raise InvalidRequest(
            "at least one of --tensorboard, --mlflow and --wandb is needed", field="--tensorboard"
        )
    job = await jobs.get(name)
    sinks: list[Sink] = []
    try:
        await asyncio.to_thread(_open, sinks, job, tensorboard, mlflow, wandb)
        first = min(sink.last_event for sink in sinks)
        if first < job.last_event or (follow_it and job.state not in FINAL_STATES):
            await _write(jobs, job, sinks, first, follow_it=follow_it)
    finally:
        for sink in sinks:
            last = sink.last_event
            typer.echo(f"up to event {last}: {await asyncio.to_thread(sink.close)}")


def _open(sinks: list[Sink], job: Job, tensorboard: Path | None, mlflow: str, wandb: str) -> None:
    # Their packages take seconds to import.
    if tensorboard:
        from rollmesh.cli.sinks.tensorboard import TensorBoard  # noqa: PLC0415

        sinks.append(TensorBoard(tensorboard, job))
    if mlflow:
        from rollmesh.cli.sinks.mlflow import MLflow  # noqa: PLC0415

        sinks.append(MLflow(mlflow, job))
    if wandb:
        from rollmesh.cli.sinks.wandb import WandB  # noqa: PLC0415

        sinks.append(WandB(wandb, job))


async def _write(
    jobs: JobClient, job: Job, sinks: list[Sink], first: int, *, follow_it: bool
) -> None:
    batch: list[JobEvent] = []
    async with contextlib.aclosing(_events(jobs, job.name, first)) as events:
        async for event in events:
            batch.append(event)
            if len(batch) == _AT_ONCE or event.number >= job.last_event:
                for sink in sinks:
                    new = [each for each in batch if each.number > sink.last_event]
                    await asyncio.to_thread(sink.write, new)
                batch = []
            if event.number >= job.last_event and not follow_it:
                return


async def _events(jobs: JobClient, name: str, first: int) -> AsyncGenerator[JobEvent]:
    async with contextlib.aclosing(follow(jobs, name, after=first)) as items:
        async for item in items:
            if isinstance(item, ConnectionLost):
                typer.echo(lost_text(item), err=True)
            else:
                yield item
