"""The tasks of a dataset, whatever it is made from."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import TYPE_CHECKING

from rollmesh.errors import (
    EnvironmentFailed,
    EnvironmentUnavailable,
    InvalidRequest,
    NotFound,
)
from services.coordinator.datasets import MAX_COUNT, Task, generate

if TYPE_CHECKING:
    from rollmesh import chat
    from rollmesh.job import DatasetSpec, JobSpec
    from services.coordinator.ports import EnvironmentPort, RewardPort

_PAGE = 1000


class Taskmaster:
    """Reads the tasks of jobs; `environments` has those that are an environment's."""

    def __init__(self, environments: EnvironmentPort) -> None:
        self._environments = environments

    async def training(self, spec: JobSpec, *, most_of_split: int = MAX_COUNT) -> list[Task]:
        """What the job trains on; of an environment's split at most so many.

        Raises:
            InvalidRequest: the generator, a parameter or the split; the field is its path in the
                spec.
            NotFound: there is no such environment.
            Unavailable: the environment, or the reward service, is away.
        """
        return await self._tasks(spec, spec.dataset, "dataset", most_of_split)

    async def evaluation(
        self, spec: JobSpec, *, most_of_split: int = MAX_COUNT
    ) -> dict[str, list[Task]]:
        """What the job is evaluated on, by set, "" being evaluation.dataset.

        Raises:
            MeshError: as `training`.
        """
        if spec.evaluation is None:
            return {}
        evaluation = spec.evaluation
        sets = {"": (evaluation.dataset, evaluation.max_tasks, "evaluation.dataset")}
        for index, one in enumerate(evaluation.sets):
            sets[one.name] = one.dataset, one.max_tasks, f"evaluation.sets.{index}.dataset"
        found = {}
        for name, (dataset, max_tasks, field) in sets.items():
            most = most_of_split if max_tasks is None else min(max_tasks, most_of_split)
            found[name] = (await self._tasks(spec, dataset, field, most))[:max_tasks]
        return found

    async def _tasks(
        self, spec: JobSpec, dataset: DatasetSpec, field: str, most_of_split: int
    ) -> list[Task]:
        if dataset.split:
            assert spec.environment is not None  # noqa: S101 - else nobody has splits
            name = spec.environment.name
            return await self._of_environment(name, dataset.split, field, most_of_split)
        # May take a second: not for the event loop.
        return await asyncio.to_thread(_tasks, dataset, seed=spec.seed, field=field)

    async def _of_environment(
        self, environment: str, split: str, field: str, most: int
    ) -> list[Task]:
        found: list[Task] = []
        token = ""
        while len(found) < most:
            try:
                page, token = await self._environments.list_tasks(
                    environment, split, page_size=min(_PAGE, most - len(found)), page_token=token
                )
            except InvalidRequest as error:
                raise InvalidRequest(
                    f"{field}.split: {error}", field=f"{field}.split", value=split
                ) from None
            found += [Task(task.id, dict(task.fields), split, task.messages) for task in page]
            if not token:
                break
            if not page:
                raise EnvironmentFailed(
                    f"{environment} told a page without tasks that is not the last",
                    environment=environment,
                )
        if not found:
            raise InvalidRequest(
                f"{field}.split: {environment} has no tasks in {split!r}",
                field=f"{field}.split",
                value=split,
            )
        return found[:most]


async def environment_of(
    spec: JobSpec, reward: RewardPort, environments: EnvironmentPort
) -> chat.EnvironmentInfo | None:
    """What the job's environment says of itself; None: it has none.

    Raises:
        NotFound: the reward service knows none of that name.
        EnvironmentUnavailable: it knows it, and it is away.
        Unavailable: the reward service is away.
    """
    if spec.environment is None:
        return None
    name = spec.environment.name
    await check_environment(name, reward, field="environment.name")
    for info in await environments.describe():
        if info.name == name:
            return info
    raise EnvironmentUnavailable(f"environment {name!r} went away just now", environment=name)


async def check_environment(name: str, reward: RewardPort, *, field: str) -> None:
    """Refuse one that is not there.

    Raises:
        NotFound, EnvironmentUnavailable, Unavailable: as `environment_of`.
    """
    statuses = {status.name: status for status in await reward.list_environments()}
    if name not in statuses:
        known = ", ".join(sorted(statuses)) or "none"
        raise NotFound(
            f"{field}: there is no environment {name!r}; there are: {known}",
            field=field,
            value=name,
            allowed=known,
        )
    if not statuses[name].serving:
        raise EnvironmentUnavailable(
            f"environment {name!r} is away: {statuses[name].problem}", environment=name
        )


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
