"""The tasks of reasoning-gym as an environment: made on the fly, the same for the same id.

A split is a range of seeds, and the ranges do not meet. Where a kind of task has few problems, two
seeds may still make the same one.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
from typing import TYPE_CHECKING, Any

from rollmesh import chat
from rollmesh.errors import InvalidRequest, NotFound
from rollmesh.types import ScoreItem
from services.reward.failures import first_of_group
from services.reward.reasoning import dataset
from services.reward.workers import Stuck

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.reward.scoring import Isolation

INSTRUCTION = "Give the final answer between <answer> and </answer>."
_SEEDS = {"train": 0, "heldout": 1 << 30}
"""The first seed of each split. Item i is made from the seed plus i."""


class ReasoningGym:
    """Tasks of one kind, as `ports.LocalEnvironment` says. Making one imports the package: blocks.

    Args:
        name: what the environment is called.
        tasks: the kind, e.g. "chain_sum".
        config: what the tasks are configured with.
        sizes: tasks of the splits train and heldout.
        isolation: where answers are scored.

    Raises:
        InvalidRequest: there is no such kind, or it does not take `config`.
        FailedPrecondition: reasoning-gym is not installed.
    """

    def __init__(
        self,
        name: str,
        tasks: str,
        config: Mapping[str, Any],
        sizes: Mapping[str, int],
        isolation: Isolation,
    ) -> None:
        self._tasks = tasks
        self._config = config
        self._sizes = sizes
        self._isolation = isolation
        self._datasets = {
            split: dataset(tasks, config, seed=_SEEDS[split], size=size)
            for split, size in sizes.items()
        }
        self.info = chat.EnvironmentInfo(
            name=name,
            version=f"reasoning-gym-{importlib.metadata.version('reasoning-gym')}",
            splits=tuple(chat.Split(split, size) for split, size in sizes.items()),
            description=f"{tasks} of reasoning-gym.",
            has_score=True,
            deterministic=True,
        )

    def page(self, split: str, start: int, count: int) -> list[chat.Task]:
        """As LocalEnvironment says."""
        if split not in self._sizes:
            allowed = ", ".join(self._sizes)
            raise InvalidRequest(
                f"split: {split[:100]!r} is not one of {allowed}",
                field="split",
                value=split[:100],
                allowed=allowed,
            )
        stop = min(start + count, self._sizes[split])
        return [self._task(split, index) for index in range(start, stop)]

    def task(self, task_id: str) -> chat.Task:
        """As LocalEnvironment says."""
        place = self._place(task_id)
        if place is None:
            raise NotFound(f"no task {task_id[:255]!r}", resource=task_id[:255])
        return self._task(*place)

    async def score(self, items: Sequence[chat.Answered]) -> list[chat.Scored]:
        """As LocalEnvironment says. A job with tasks of its own gives the entry in `entry`."""
        turns = asyncio.Semaphore(self._isolation.count)

        async def one(item: chat.Answered) -> chat.Scored:
            async with turns:
                return await self._scored(item)

        with first_of_group():
            async with asyncio.TaskGroup() as tasks:
                scoring = [tasks.create_task(one(item)) for item in items]
        return [task.result() for task in scoring]

    async def _scored(self, item: chat.Answered) -> chat.Scored:
        place = self._place(item.task.id)
        if place is not None:
            split, index = place
            where = {"seed": _SEEDS[split], "index": index, "size": self._sizes[split]}
            reference = json.dumps(where)
        elif "entry" in item.task.fields:
            reference = item.task.fields["entry"]
        else:
            return chat.Scored(failure=f"no task {item.task.id[:255]!r}, and no field `entry`")
        parameters = {"dataset": self._tasks, "config": dict(self._config)}
        answer = ScoreItem(item.messages[-1].content, reference)
        try:
            return await self._isolation.score("reasoning_gym", parameters, answer)
        except InvalidRequest as error:
            return chat.Scored(failure=str(error))
        except Stuck as stuck:
            return chat.Scored(feedback=f"not scored: {stuck}")

    def _task(self, split: str, index: int) -> chat.Task:
        question = self._datasets[split][index]["question"]
        message = chat.Message("user", f"{question}\n\n{INSTRUCTION}")
        return chat.Task(f"{self._tasks}/{split}/{index}", split, (message,))

    def _place(self, task_id: str) -> tuple[str, int] | None:
        """Split and index of a task; None: it is none of ours."""
        match task_id.split("/"):
            case [tasks, split, number] if tasks == self._tasks and split in self._sizes:
                is_ours = number.isascii() and number.isdigit() and str(int(number)) == number
                if is_ours and int(number) < self._sizes[split]:
                    return split, int(number)
        return None
