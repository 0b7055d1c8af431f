"""Environments in this process, which behave, and fail when a test says so."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rollmesh import chat
from rollmesh.errors import EnvironmentFailed, EnvironmentUnavailable, InvalidRequest, NotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


class FakeEnvironments:
    """One environment `world`: an episode of task "t3" is done, worth 1, after three actions.

    An action at a task that is `broken` fails, one at a `deadly` task takes the process with it.
    Its observations are texts that name task, seed and turn. A single turn is worth the last digit
    of its answer over ten. It is an EnvironmentPort, and tells its state as a RewardPort does.
    """

    def __init__(self, *, has_episodes: bool = True, num_tasks: int = 7) -> None:
        self.info = chat.EnvironmentInfo(
            name="world",
            version="1",
            splits=(chat.Split("train", num_tasks), chat.Split("heldout", num_tasks)),
            has_score=not has_episodes,
            has_episodes=has_episodes,
        )
        self.num_tasks = num_tasks
        self.away = ""
        self.faults: list[Exception | None] = []
        self.latency_s = 0.0
        self.rng = random.Random(0)
        self.open: Counter[str] = Counter()
        self.most_open = 0
        self.played: list[tuple[str, int, tuple[str, ...]]] = []
        self.given_up: list[str] = []
        self.scored: list[chat.Answered] = []
        self.failures: dict[str, int] = {}
        self.rewards: dict[str, float] = {}
        self.shows: dict[int, chat.Message] = {}
        self.broken: set[str] = set()
        self.deadly: set[str] = set()
        self.deaths = 0
        self.back_at = 0.0

    def die(self) -> None:
        """Its process is gone, with all that runs there, and is back in three seconds."""
        self.deaths += 1
        self.back_at = asyncio.get_running_loop().time() + 3.0

    async def list_environments(self) -> list[chat.EnvironmentStatus]:
        return [chat.EnvironmentStatus("world", not self.away, self.away)]

    async def describe(self) -> list[chat.EnvironmentInfo]:
        return [] if self.away else [self.info]

    async def list_tasks(
        self, environment: str, split: str, *, page_size: int = 0, page_token: str = ""
    ) -> tuple[list[chat.Task], str]:
        self._check(environment)
        if split not in {"train", "heldout"}:
            raise InvalidRequest(f"split: there is no {split!r}", field="split")
        start = int(page_token or 0)
        end = min(start + min(page_size or 3, 3), self.num_tasks)
        letter = "t" if split == "train" else "h"
        tasks = [self._task(f"{letter}{number}") for number in range(start, end)]
        return tasks, str(end) if end < self.num_tasks else ""

    def _task(self, task_id: str) -> chat.Task:
        split = "train" if task_id.startswith("t") else "heldout"
        if self.info.has_episodes:
            return chat.Task(task_id, split)
        return chat.Task(task_id, split, (chat.Message("user", f"{task_id}?"),), {"n": task_id[1:]})

    async def score(self, environment: str, items: Sequence[chat.Answered]) -> list[chat.Scored]:
        self._check(environment)
        await self._pause()
        self.scored += items
        return [self._scored(item) for item in items]

    def _scored(self, item: chat.Answered) -> chat.Scored:
        if item.task.id in self.broken:
            return chat.Scored(failure="this task is broken")
        if self.failures.get(item.task.id, 0) > 0:
            self.failures[item.task.id] -= 1
            return chat.Scored(failure="it broke")
        digits = [c for c in item.messages[-1].content if c.isdigit()]
        reward = int(digits[-1]) / 10 if digits else 0.0
        return chat.Scored(reward, {"digit": reward, "half": reward / 2})

    @contextlib.asynccontextmanager
    async def episode(self, environment: str, task_id: str, *, seed: int = 0) -> AsyncIterator[Any]:
        self._check(environment)
        if asyncio.get_running_loop().time() < self.back_at:
            raise EnvironmentUnavailable("world is starting")
        self.open[task_id] += 1
        self.most_open = max(self.most_open, self.open.total())
        episode = _Episode(self, task_id, seed)
        try:
            await self._pause()
            yield episode
        finally:
            self.open[task_id] -= 1
            self.played.append((task_id, seed, tuple(episode.said)))

    def _check(self, environment: str) -> None:
        if environment != "world":
            raise NotFound(f"there is no environment {environment!r}")
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            raise fault

    async def _pause(self) -> None:
        if self.latency_s:
            await asyncio.sleep(self.rng.expovariate(1.0) * self.latency_s)


class _Episode:
    def __init__(self, world: FakeEnvironments, task_id: str, seed: int) -> None:
        self._world = world
        self._task_id = task_id
        self._num_turns = int(task_id[1:]) or 1
        self._life = world.deaths
        self.said: list[str] = []
        self.first = self._seen(0, f"{task_id}/{seed % 97}:0")

    async def act(self, action: chat.Message) -> chat.Response:
        self._world._check("world")
        await self._world._pause()
        if self._life == self._world.deaths and self._task_id in self._world.deadly:
            self._world.die()
        if self._life != self._world.deaths:
            raise EnvironmentUnavailable("world died")
        if self._task_id in self._world.broken:
            raise EnvironmentFailed("this task is broken")
        self.said.append(action.content)
        turn = len(self.said)
        reward = self._world.rewards.get(action.content, 0.0)
        if turn == self._num_turns:
            return chat.Response(reward=1.0 + reward, rewards={"end": 1.0}, done=True)
        return replace(self._seen(turn, f"{self._task_id}:{turn}"), reward=reward)

    def _seen(self, turn: int, text: str) -> chat.Response:
        """In a turn of which the world `shows` something more, that too."""
        more = (self._world.shows[turn],) if turn in self._world.shows else ()
        return chat.Response((*more, chat.Message("user", text)))

    async def give_up(self) -> chat.Response | None:
        self._world.given_up.append(self._task_id)
        return chat.Response(reward=0.25, done=True, truncated=True)


def with_limits(info: chat.EnvironmentInfo, **limits: int) -> chat.EnvironmentInfo:
    """The same environment with other limits."""
    return replace(info, limits=replace(info.limits, **limits))
