"""Where a researcher looks at metrics: TensorBoard, MLflow, Weights & Biases.

They are on the client's side, where accounts and folders are. A sink takes events in their order,
and knows after a restart which was the last: what is exported again is not there twice. A chart has
the same name in each of them, `POINTS` says which.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from typing import TYPE_CHECKING, Any, Protocol

from rollmesh.errors import FailedPrecondition
from rollmesh.job import EvaluationCompleted, StepCompleted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rollmesh.job import Job, JobEvent

POINTS = """\
train/METRIC                 every metric of a step, by optimizer step
phase/PHASE                  seconds of each phase of a step
evaluation/reward_mean       evaluation.dataset
evaluation/SET/reward_mean   a set of evaluation.sets"""
LAST_EVENT = "job/last_event"
"""Beside the points: number of the event that they are of."""


class Sink(Protocol):
    """One run of a job's metrics somewhere."""

    @property
    def last_event(self) -> int:
        """Number of the last event that it has; 0: none."""
        ...

    def write(self, events: Sequence[JobEvent]) -> None:
        """Take the next events: all of them once this returns."""
        ...

    def close(self) -> str:
        """End it; where to look at what it has."""
        ...


def points_of(event: JobEvent) -> tuple[int, dict[str, float]]:
    """The optimizer step that an event is of, and what it measured; nothing of most events."""
    match event.event:
        case StepCompleted(step=step, metrics=metrics, phases=phases):
            points = {f"train/{name}": value for name, value in metrics.items()}
            return step, points | {f"phase/{name}": value for name, value in phases.items()}
        case EvaluationCompleted(step=step, set=name, reward_mean=reward):
            path = f"evaluation/{name}/reward_mean" if name else "evaluation/reward_mean"
            return step, {path: reward}
        case _:
            return 0, {}


def parameters_of(job: Job) -> dict[str, str | int | float | bool]:
    """The job's spec by path, as it was given and without its tasks."""
    spec = job.spec.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    spec["dataset"].pop("tasks", None)
    if "evaluation" in spec:
        for section in (spec["evaluation"], *spec["evaluation"].get("sets", [])):
            section["dataset"].pop("tasks", None)
    return dict(_flat(spec, ""))


def _flat(value: Any, path: str) -> Iterator[tuple[str, str | int | float | bool]]:
    match value:
        case dict():
            for key, inner in value.items():
                yield from _flat(inner, f"{path}.{key}" if path else key)
        case list():
            for index, inner in enumerate(value):
                yield from _flat(inner, f"{path}.{index}")
        case _:
            yield path, value


def key_of(job: Job) -> str:
    """Tells the job from others of its name on other meshes."""
    return hashlib.sha256(f"{job.name}@{job.create_time:.6f}".encode()).hexdigest()[:8]


@contextlib.contextmanager
def told_as(option: str, *expected: type[Exception]) -> Iterator[None]:
    """`expected` errors of the package behind `option`, as one of ours."""
    try:
        yield
    except expected as error:
        raise FailedPrecondition(f"{option}: {error}", field=option) from error


def package(name: str, option: str) -> Any:
    """The package that a sink writes with.

    Raises:
        FailedPrecondition: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise FailedPrecondition(
            f"{option} needs the package {error.name}: pip install 'rollmesh[metrics]'",
            field=option,
        ) from error
