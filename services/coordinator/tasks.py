"""The tasks of a dataset, whatever it is made from."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from rollmesh.errors import InvalidRequest
from services.coordinator.datasets import Task, generate

if TYPE_CHECKING:
    from rollmesh.job import DatasetSpec, JobSpec


def training_tasks(spec: JobSpec) -> list[Task]:
    """What the job trains on. May take a second: not for the event loop.

    Raises:
        InvalidRequest: the generator or a parameter; the field is its path in the spec.
    """
    return _tasks(spec.dataset, seed=spec.seed, field="dataset")


def evaluation_tasks(spec: JobSpec) -> dict[str, list[Task]]:
    """What the job is evaluated on, by set, "" being evaluation.dataset.

    Raises:
        InvalidRequest: as training_tasks.
    """
    if spec.evaluation is None:
        return {}
    tasks = _tasks(spec.evaluation.dataset, seed=spec.seed, field="evaluation.dataset")
    sets = {"": tasks[: spec.evaluation.max_tasks]}
    for index, one in enumerate(spec.evaluation.sets):
        tasks = _tasks(one.dataset, seed=spec.seed, field=f"evaluation.sets.{index}.dataset")
        sets[one.name] = tasks[: one.max_tasks]
    return sets


def _tasks(dataset: DatasetSpec, *, seed: int, field: str) -> list[Task]:
    if dataset.generator is None:
        return [Task(id=_id(task.fields), fields=task.fields) for task in dataset.tasks]
    try:
        return generate(dataset.generator.name, dataset.generator.parameters, seed=seed)
    except InvalidRequest as error:
        known_as = {"generator": "name", "parameters": "parameters"}
        key = error.context["field"]
        path = f"{field}.generator.{known_as.get(key, f'parameters.{key}')}"
        raise InvalidRequest(f"{path}: {error}", **{**error.context, "field": path}) from None


def _id(fields: dict[str, str]) -> str:
    """Equal for equal tasks."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
