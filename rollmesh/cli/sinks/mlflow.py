"""MLflow: a run for each job in the experiment of its project."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from rollmesh.cli.sinks import LAST_EVENT, key_of, package, parameters_of, points_of, told_as
from rollmesh.names import parse_job

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rollmesh.job import Job, JobEvent

OPTION = "--mlflow"
_KEY = "rollmesh.key"
_MAX_METRICS = 1000
_MAX_PARAMS = 100
"""Of one call, as MLflow has it."""
_MAX_VALUE = 500


class MLflow:
    """The run of a job at a tracking server or database, found again by its tag.

    The tag that says which event was the last is written with the points. A point that is written
    twice, because a process died in between, is there once: its time is the event's.
    """

    def __init__(self, uri: str, job: Job) -> None:
        self._mlflow = package("mlflow", OPTION)
        # It tells at length what it does to a database.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._error = self._mlflow.exceptions.MlflowException
        project, job_id = parse_job(job.name)
        with told_as(OPTION, self._error):
            self._client = self._mlflow.MlflowClient(tracking_uri=uri)
            self._experiment = self._experiment_of(f"rollmesh/{project}")
            run = self._run_of(key_of(job)) or self._client.create_run(
                self._experiment,
                start_time=int(job.create_time * 1000),
                run_name=job_id,
                tags={_KEY: key_of(job), "rollmesh.job": job.name},
            )
            self._run: str = run.info.run_id
            self.last_event = int(run.data.tags.get(LAST_EVENT, 0))
            params = [
                self._mlflow.entities.Param(path, str(value)[:_MAX_VALUE])
                for path, value in parameters_of(job).items()
            ]
            for first in range(0, len(params), _MAX_PARAMS):
                self._client.log_batch(self._run, params=params[first : first + _MAX_PARAMS])

    def write(self, events: Sequence[JobEvent]) -> None:
        """Take the next events."""
        entities = self._mlflow.entities
        metrics: list[Any] = []
        for event in events:
            step, points = points_of(event)
            if len(metrics) + len(points) > _MAX_METRICS:
                self._log(metrics)
                metrics = []
            metrics += [
                entities.Metric(name, value, int(event.time * 1000), step)
                for name, value in points.items()
            ]
            self.last_event = event.number
        self._log(metrics)

    def close(self) -> str:
        """End the run."""
        with told_as(OPTION, self._error):
            self._client.set_terminated(self._run)
        return f"MLflow run {self._run}"

    def _log(self, metrics: list[Any]) -> None:
        tag = self._mlflow.entities.RunTag(LAST_EVENT, str(self.last_event))
        with told_as(OPTION, self._error):
            self._client.log_batch(self._run, metrics=metrics, tags=[tag])

    def _experiment_of(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        experiment: str = found.experiment_id if found else self._client.create_experiment(name)
        return experiment

    def _run_of(self, key: str) -> Any:
        found = self._client.search_runs(
            [self._experiment], filter_string=f"tags.`{_KEY}` = '{key}'", max_results=1
        )
        return found[0] if found else None
