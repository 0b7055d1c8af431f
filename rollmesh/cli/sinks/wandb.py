"""Weights & Biases: a run for each job, online or, with WANDB_MODE=offline, in files to sync."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rollmesh.cli.sinks import LAST_EVENT, key_of, package, parameters_of, points_of, told_as
from rollmesh.names import parse_job

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rollmesh.job import Job, JobEvent

OPTION = "--wandb"
STEP = "job/step"
"""What charts are drawn over. W&B's own step is the number of the event, and so never goes back."""


class WandB:
    """The run of a job in a project of W&B, whose id is made from the job.

    Online its summary says which event was the last, offline a file beside the runs.
    """

    def __init__(self, project: str, job: Job) -> None:
        wandb = package("wandb", OPTION)
        self._wandb = wandb
        self._error: type[Exception] = wandb.errors.Error
        mesh_project, job_id = parse_job(job.name)
        key = key_of(job)
        with told_as(OPTION, self._error):
            self._run = wandb.init(
                project=project,
                group=mesh_project,
                id=key,
                name=job_id,
                config={"job": job.name, **parameters_of(job)},
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )
            self._run.define_metric(STEP)
            self._run.define_metric("*", step_metric=STEP)
        # …/wandb/offline-run-TIME-KEY/files
        self._file = Path(self._run.dir).parents[1] / f"rollmesh-{key}"
        self._offline: bool = self._run.offline
        if self._offline:
            self.last_event = int(self._file.read_text()) if self._file.exists() else 0
        else:
            self.last_event = int(self._run.summary.get(LAST_EVENT, 0))

    def write(self, events: Sequence[JobEvent]) -> None:
        """Take the next events."""
        for event in events:
            step, points = points_of(event)
            if points:
                told = {**points, STEP: step, LAST_EVENT: event.number}
                with told_as(OPTION, self._error):
                    self._run.log(told, step=event.number)
            self.last_event = event.number
        if self._offline:
            newer = self._file.with_suffix(".new")
            newer.write_text(str(self.last_event))
            newer.replace(self._file)

    def close(self) -> str:
        """End the run once all is written."""
        with told_as(OPTION, self._error):
            self._run.finish()
            # Its own process writes the files, and may still be at it when the run has finished.
            self._wandb.teardown()
        if self._offline:
            return f"wandb sync {Path(self._run.dir).parent}"
        return str(self._run.url)
