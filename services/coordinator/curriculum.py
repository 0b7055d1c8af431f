"""A curriculum by reward: what the policy can learn from now is drawn before the rest.

A choice is a function of the seed, the group's number and the rewards observed until it is made;
choices of groups that are not trained yet are remembered. So a successor makes the same ones.
"""

from __future__ import annotations

import base64
import random
import zlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from services.coordinator.rollouts import derived_seed

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from rollmesh.job import JobSpec
    from services.coordinator.datasets import Task
    from services.coordinator.groups import Group


class Curriculum:
    """A ports.TaskSource.

    Inside are the tasks whose last mean reward lies within the bounds, and those that were never
    trained on. A group is of a random one of them that no group under way has; with probability
    `revisit`, or where there is none, of one outside.

    Args:
        spec: the job, which has a curriculum.
        tasks: where equal ones count as one.
        step: optimizer steps that are recorded as finished,
        memory: and what was remembered with the last of them.
    """

    def __init__(
        self, spec: JobSpec, tasks: Sequence[Task], *, step: int, memory: Mapping[str, Any]
    ) -> None:
        assert spec.curriculum is not None  # noqa: S101 - the caller's
        self._curriculum = spec.curriculum
        self._seed = spec.seed
        self._groups_per_step = spec.algorithm.groups_per_step
        self._num_under_way = (spec.algorithm.max_staleness + 1) * self._groups_per_step
        self._tasks = list({task.id: task for task in tasks}.values())
        self._index = {task.id: index for index, task in enumerate(self._tasks)}
        # Mean reward of each task's last group; NaN: it had none.
        self._rewards = _unpacked(memory.get("rewards", ""), len(self._tasks))
        self._packed = _packed(self._rewards)
        self._trained = step * self._groups_per_step
        # By number, the task of each attempt: of groups that are not trained yet, without gaps.
        self._chosen: dict[int, list[int]] = {
            int(number): list(attempts) for number, attempts in memory.get("chosen", {}).items()
        }
        self._under_way = Counter(attempts[0] for attempts in self._chosen.values())
        self._sides = self._split()

    def choose(self, number: int, attempt: int) -> Task:
        """The task of a group; of a replacement one that the group did not have before."""
        self._choose_up_to(number + 1)
        attempts = self._chosen[number]
        while len(attempts) <= attempt:
            attempts.append(self._draw(number, len(attempts), set(attempts)))
        return self._tasks[attempts[attempt]]

    def observe(self, groups: Sequence[Group]) -> None:
        """Take note of the rewards of the groups that a step was trained on."""
        # All for which there was room have been admitted: an interrupted loop knew their tasks.
        self._choose_up_to(self._trained + self._num_under_way)
        self._trained += self._groups_per_step
        for number in range(self._trained - self._groups_per_step, self._trained):
            self._under_way[self._chosen.pop(number)[0]] -= 1
        self._under_way += Counter()
        for group in groups:
            mean = sum(group.rewards) / len(group.rewards)
            # An interrupted loop may have kept groups of tasks that the environment has no more.
            if group.task.id in self._index:
                self._rewards[self._index[group.task.id]] = mean
        self._packed = _packed(self._rewards)
        self._sides = self._split()

    @property
    def memory(self) -> Mapping[str, Any]:
        """JSON; its size is bounded by the tasks, 8 bytes of each before compression."""
        return {
            "rewards": self._packed,
            "chosen": {str(number): list(tasks) for number, tasks in self._chosen.items()},
        }

    def _choose_up_to(self, end: int) -> None:
        """In the order of the numbers: which tasks are under way decides over the next."""
        for number in range(self._trained + len(self._chosen), end):
            task = self._draw(number, 0, self._under_way)
            self._chosen[number] = [task]
            self._under_way[task] += 1

    def _draw(self, number: int, attempt: int, taken: Collection[int]) -> int:
        seed = derived_seed(self._seed, "curriculum", number, attempt)
        rng = random.Random(seed)  # noqa: S311 - guards nothing
        inside, outside = self._sides
        sides = [inside, outside]
        if rng.random() < self._curriculum.revisit:
            sides = [outside, inside]
        starts = [(side, rng.randrange(len(side))) for side in sides if len(side)]
        for side, start in starts:
            # Not further than one more than those that are taken.
            for place in range(start, start + min(len(side), len(taken) + 1)):
                task = int(side[place % len(side)])
                if task not in taken:
                    return task
        side, start = starts[0]
        return int(side[start])

    def _split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tasks inside, and those outside."""
        low, high = self._curriculum.min_reward, self._curriculum.max_reward
        rewards = self._rewards
        inside = np.isnan(rewards) | (
            (rewards >= (-np.inf if low is None else low))
            & (rewards <= (np.inf if high is None else high))
        )
        return np.flatnonzero(inside), np.flatnonzero(~inside)


def _packed(rewards: NDArray[np.float64]) -> str:
    return base64.b64encode(zlib.compress(rewards.astype("<f8").tobytes(), 1)).decode()


def _unpacked(text: str, size: int) -> NDArray[np.float64]:
    if not text:
        return np.full(size, np.nan)
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<f8").astype(np.float64)
