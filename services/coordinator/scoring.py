"""What single-turn completions are worth: by a reward function, or by an environment."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

from rollmesh import chat, types
from rollmesh.chat_template import answer_of
from rollmesh.errors import EnvironmentFailed, EnvironmentTimeout, InternalError
from services.coordinator.prompts import fill, task_messages

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from rollmesh.job import PromptSpec, RewardSpec
    from services.coordinator.datasets import Task
    from services.coordinator.ports import EnvironmentPort, RewardPort, Tokenizer
    from services.coordinator.retry import Patience
    from services.coordinator.tolerance import Tolerance


@dataclass(frozen=True, slots=True)
class Drawn:
    """Completions of one task's prompt."""

    task: Task
    prompt_token_ids: Sequence[int]
    completions: Sequence[types.Completion]


@dataclass(frozen=True, slots=True)
class Worth:
    """What one completion is worth, and what that is made up of, by name."""

    reward: float = 0.0
    rewards: Mapping[str, float] = field(default_factory=dict)


class Scorer(Protocol):
    """Says what completions are worth."""

    async def score(self, all_drawn: Sequence[Drawn]) -> list[Worth | None]:
        """Of all completions, in order; None: it could not be told, and that has been counted."""
        ...


class NoReward:
    """Of a job without one: everything is worth 0."""

    async def score(self, all_drawn: Sequence[Drawn]) -> list[Worth | None]:
        """Nothing."""
        return [Worth() for drawn in all_drawn for _ in drawn.completions]


class FunctionScorer:
    """By a reward function; waits while the reward service is away. `judge` answers it."""

    def __init__(
        self,
        spec: RewardSpec,
        *,
        reward: RewardPort,
        patience: Patience,
        judge: Callable[[chat.Question], Awaitable[str]],
        tokenizer: Tokenizer,
    ) -> None:
        self._spec = spec
        self._reward = reward
        self._patience = patience
        self._judge = judge
        self._tokenizer = tokenizer

    async def score(self, all_drawn: Sequence[Drawn]) -> list[Worth | None]:
        """What the function says.

        Raises:
            InvalidRequest: it refuses its parameters or a completion.
        """
        items = [item for drawn in all_drawn for item in self._items(drawn)]
        scores = await self._patience.call(
            lambda: self._reward.score_each(
                self._spec.function, self._spec.parameters, items, judge=self._judge
            )
        )
        if len(scores) != len(items):
            raise InternalError(f"the reward service scored {len(scores)} of {len(items)} items")
        return [Worth(score.reward, score.rewards) for score in scores]

    def _items(self, drawn: Drawn) -> list[types.ScoreItem]:
        reference = fill(self._spec.reference, drawn.task, field="reward.reference")
        prompt = self._tokenizer.decode(drawn.prompt_token_ids)
        return [
            types.ScoreItem(
                completion=self._tokenizer.decode(completion.token_ids),
                reference=reference,
                prompt=prompt,
            )
            for completion in drawn.completions
        ]


class EnvironmentScorer:
    """By an environment, of whose tasks there is one turn, or of the job's own.

    Args:
        name: of the environment.
        environments: where it is asked.
        prompt: what makes a task's chat; None: the task has it.
        tolerance: of its failures.
        tokenizer: makes messages of completions.
    """

    def __init__(
        self,
        name: str,
        *,
        environments: EnvironmentPort,
        prompt: PromptSpec | None,
        tolerance: Tolerance,
        tokenizer: Tokenizer,
    ) -> None:
        self._name = name
        self._environments = environments
        self._prompt = prompt
        self._tolerance = tolerance
        self._tokenizer = tokenizer

    async def score(self, all_drawn: Sequence[Drawn]) -> list[Worth | None]:
        """What it says. An answer at which it failed is asked about again, by itself.

        Of a task of which one is given up none is worth anything.
        """
        of_each = [self._items(drawn) for drawn in all_drawn]
        items = [item for of_one in of_each for item in of_one]

        async with asyncio.TaskGroup() as tasks:
            together = tasks.create_task(self._together(items))

            async def worth(index: int) -> Worth:
                item = items[index]

                async def attempt(number: int) -> chat.Scored:
                    if number == 0:
                        # Whoever gives up takes nothing from the others.
                        return _or_raise((await asyncio.shield(together))[index])
                    return _or_raise((await self._environments.score(self._name, [item]))[0])

                scored = await self._tolerance.call(
                    f"scoring an answer to task {item.task.id!r} of {self._name}", attempt
                )
                return Worth(scored.reward, scored.rewards)

            found = []
            first = 0
            for of_one in of_each:
                rollouts = [partial(worth, index) for index in range(first, first + len(of_one))]
                found.append(tasks.create_task(self._tolerance.group(rollouts)))
                first += len(of_one)
        worths: list[Worth | None] = []
        for each, of_one in zip(found, of_each, strict=True):
            worths += each.result() or [None] * len(of_one)
        return worths

    async def _together(self, items: Sequence[chat.Answered]) -> list[chat.Scored]:
        """All of them in one call; where it fails, each has failed."""
        try:
            return await self._tolerance.patient(
                lambda: self._environments.score(self._name, items)
            )
        except (EnvironmentFailed, EnvironmentTimeout) as failure:
            return [chat.Scored(failure=str(failure))] * len(items)

    def _items(self, drawn: Drawn) -> list[chat.Answered]:
        task = chat.Task(
            drawn.task.id, drawn.task.split, drawn.task.messages, dict(drawn.task.fields)
        )
        asked = task_messages(self._prompt, drawn.task)
        return [
            chat.Answered(task, [*asked, answer_of(completion.token_ids, self._tokenizer)])
            for completion in drawn.completions
        ]


def _or_raise(scored: chat.Scored) -> chat.Scored:
    if scored.failure:
        raise EnvironmentFailed(scored.failure)
    return scored
