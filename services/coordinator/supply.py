"""The finished groups of one job: made, kept, and replaced where they teach nothing.

A group is kept before anybody counts on it. Whoever goes on with the job finds it, with the attempt
that it is, and neither samples it again nor asks anew what was to come of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from services.coordinator.batch import equal_rewards
from services.coordinator.group_bytes import group_to_bytes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine, Iterable, Mapping

    from rollmesh.job import AlgorithmSpec
    from rollmesh.types import AdapterSource
    from services.coordinator.datasets import Task
    from services.coordinator.groups import Group
    from services.coordinator.ports import GroupMaker, Recorder, TaskSource, Teacher
    from services.coordinator.versions import Versions


class Supply:
    """Makes groups by their numbers.

    Args:
        algorithm: how often a group is replaced.
        kept: what an interrupted loop has kept.
        tasks: chooses what groups are of.
        maker: samples and scores them.
        teacher: judges them; None: nobody does.
        recorder: keeps them.
        versions: who draws from what.
    """

    def __init__(
        self,
        algorithm: AlgorithmSpec,
        kept: Mapping[int, Group],
        *,
        tasks: TaskSource,
        maker: GroupMaker,
        teacher: Teacher | None,
        recorder: Recorder,
        versions: Versions,
    ) -> None:
        self._max_replacements = algorithm.max_group_replacements
        # Gets smaller: no more than a buffer is large at first.
        self._kept = dict(kept)
        self._tasks = tasks
        self._maker = maker
        self._teacher = teacher
        self._recorder = recorder
        self._versions = versions

    def take(self, numbers: Iterable[int]) -> list[Group]:
        """Those of the groups `numbers` that an interrupted loop finished; they are gone then."""
        return [
            self._kept.pop(number)
            for number in numbers
            if number in self._kept and not self._to_be_replaced(self._kept[number])
        ]

    def waiting(self) -> list[Group]:
        """Those that an interrupted loop finished and nobody has taken."""
        return [group for group in self._kept.values() if not self._to_be_replaced(group)]

    def group(self, number: int, source: AdapterSource) -> Coroutine[None, None, Group]:
        """Chooses its task now; what makes the group, from `source`."""
        before = self._kept.pop(number, None)
        attempt = 0 if before is None else before.attempt + 1
        return self._make(number, source, self._tasks.choose(number, attempt), attempt)

    def again(self, group: Group, source: AdapterSource) -> Awaitable[Group]:
        """The same, sampled again: what was drawn of it is not to be trained on."""
        return self._make(group.number, source, group.task, group.attempt)

    async def _make(self, number: int, source: AdapterSource, task: Task, attempt: int) -> Group:
        with self._versions.drawn_from(source):
            while True:
                group = await self._maker.group(number, source, task, attempt)
                if group is None:  # Its environment failed at it.
                    attempt += 1
                    task = self._tasks.choose(number, attempt)
                    continue
                replaced = self._to_be_replaced(group)
                if self._teacher is not None and not replaced:
                    judged = await self._teacher.logprobs(group)
                    group = replace(group, teacher_logprobs=judged)
                await self._recorder.keep(number, group_to_bytes(group))
                if not replaced:
                    return group
                attempt += 1
                task = self._tasks.choose(number, attempt)

    def _to_be_replaced(self, group: Group) -> bool:
        """Dynamic sampling, DAPO (arXiv:2503.14476, §3.2): equal rewards teach nothing."""
        return group.attempt < self._max_replacements and equal_rewards(group)
