"""Groups of single-turn rollouts: a task's prompt, its completions, what they are worth.

Everything random is a function of the job's seed and the group's number, so a job that is started
again goes on with the tasks and seeds that it would have had.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rollmesh import telemetry
from services.coordinator.groups import Group, Rollout, Turn, oldest_version
from services.coordinator.prompts import prompt_token_ids
from services.coordinator.scoring import Drawn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rollmesh import types
    from rollmesh.job import JobSpec
    from services.coordinator.datasets import Task
    from services.coordinator.draws import Draws
    from services.coordinator.newest import Newest
    from services.coordinator.ports import Tokenizer
    from services.coordinator.scoring import Scorer

MAX_CONCURRENT = 256
"""Requests of one evaluation at once: enough to fill a sampler, few enough to leave its queue."""
SCORE_BATCH = 512


class Rollouts:
    """A ports.RolloutMaker: draws and scores completions for one job."""

    def __init__(
        self, spec: JobSpec, *, draws: Draws, scorer: Scorer, tokenizer: Tokenizer
    ) -> None:
        self._spec = spec
        self._draws = draws
        self._scorer = scorer
        self._tokenizer = tokenizer

    async def group(
        self, number: int, source: types.AdapterSource, task: Task, attempt: int = 0
    ) -> Group | None:
        """The group of that number, sampled from `source` or what follows it, and scored."""
        clock = asyncio.get_running_loop().time
        spec = self._spec
        again = (attempt,) if attempt else ()
        with telemetry.span("job.group", number=number, policy_version=source.policy_version):
            start = clock()
            seed = derived_seed(spec.seed, "group", number, task.id, *again)
            drawn = await self._drawn(
                task,
                source,
                spec.algorithm.group_size,
                self._draws.training_params(seed),
                self._draws.newest,
            )
            sampled = clock()
            found = await self._scorer.score([drawn])
            if any(worth is None for worth in found):
                return None
            rollouts = [
                Rollout(
                    [Turn(drawn.prompt_token_ids, completion)],
                    worth.reward,
                    worth.rewards,
                    truncated=completion.stop_reason == "length",
                )
                for completion, worth in zip(drawn.completions, found, strict=True)
                if worth is not None
            ]
            return Group(
                number=number,
                policy_version=oldest_version(rollouts),
                task=task,
                rollouts=rollouts,
                sample_s=sampled - start,
                reward_s=clock() - sampled,
                attempt=attempt,
            )

    async def evaluated(
        self, tasks: Sequence[Task], source: types.AdapterSource
    ) -> list[float | None]:
        """The rewards of one greedy completion of each task, all drawn before any is scored."""
        params = self._draws.greedy_params()
        drawn: dict[int, Drawn] = {}

        async def work(pending: Iterator[tuple[int, Task]]) -> None:
            for index, task in pending:
                drawn[index] = await self._drawn(task, source, 1, params)

        pending = iter(enumerate(tasks))
        async with asyncio.TaskGroup() as workers:
            for _ in range(min(MAX_CONCURRENT, len(tasks))):
                workers.create_task(work(pending))
        in_order = [drawn[index] for index in range(len(tasks))]
        rewards: list[float | None] = []
        for first in range(0, len(tasks), SCORE_BATCH):
            found = await self._scorer.score(in_order[first : first + SCORE_BATCH])
            rewards += [None if worth is None else worth.reward for worth in found]
        return rewards

    async def _drawn(
        self,
        task: Task,
        source: types.AdapterSource,
        num_completions: int,
        params: types.SamplingParams,
        newest: Newest | None = None,
    ) -> Drawn:
        prompt = prompt_token_ids(self._spec.prompt, task, self._tokenizer)
        completions = await self._draws.completions(
            task.id, source, prompt, num_completions, params, newest
        )
        return Drawn(task, prompt, completions)


class TaskOrder:
    """Every epoch goes through all tasks, in an order of its own. A ports.TaskSource."""

    def __init__(self, tasks: Sequence[Task], seed: int) -> None:
        self._tasks = tasks
        self._seed = seed
        # Groups are asked for in the order of their numbers: at most two epochs are under way.
        self._order_of = lru_cache(maxsize=2)(self._order)

    def choose(self, number: int, attempt: int) -> Task:
        """That of the group's place in its epoch, then others: each once before one comes again."""
        epoch, place = divmod(number, len(self._tasks))
        if attempt and len(self._tasks) > 1:
            num_others = len(self._tasks) - 1
            first = derived_seed(self._seed, "replacement", number)
            place += 1 + (first + attempt - 1) % num_others
        return self._tasks[self._order_of(epoch)[place % len(self._tasks)]]

    def observe(self, groups: Sequence[Group]) -> None:
        """Nothing follows from how the policy does."""

    @property
    def memory(self) -> Mapping[str, Any]:
        """Everything is a function of the seed."""
        return {}

    def _order(self, epoch: int) -> Sequence[int]:
        order = list(range(len(self._tasks)))
        seed = derived_seed(self._seed, "epoch", epoch)
        random.Random(seed).shuffle(order)  # noqa: S311 - guards nothing
        return order


def derived_seed(seed: int, *path: int | str) -> int:
    """A seed in [0, 2**48) for one use: small enough for every engine, and for JSON's numbers."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])
