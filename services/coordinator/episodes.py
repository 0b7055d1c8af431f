"""Groups of rollouts in an environment: what it shows and what the policy says take turns.

The policy's own tokens are kept as they were drawn; what the environment says is rendered behind
them, and nothing is tokenized twice. The environment sees messages, never tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from rollmesh import telemetry
from rollmesh.chat_template import answer_of, template_messages, template_tools
from rollmesh.errors import EnvironmentFailed, EnvironmentUnavailable, InvalidRequest
from services.coordinator.groups import Group, Rollout, Turn, oldest_version
from services.coordinator.rollouts import derived_seed
from services.coordinator.tolerance import RolloutLost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rollmesh import chat, types
    from rollmesh.job import JobSpec
    from services.coordinator.datasets import Task
    from services.coordinator.draws import Draws
    from services.coordinator.newest import Newest
    from services.coordinator.ports import EnvironmentPort, Tokenizer
    from services.coordinator.tolerance import Tolerance

    Params = Callable[[int], types.SamplingParams]

MAX_EPISODES = 1024
"""Of one job at once, however many rollouts are under way: the others wait here, and neither in the
reward service's queue nor as open streams."""


@dataclass(slots=True)
class _Played:
    """An episode so far."""

    turns: list[Turn] = field(default_factory=list)
    reward: float = 0.0
    rewards: dict[str, float] = field(default_factory=dict)
    truncated: bool = False
    sample_s: float = 0.0
    reward_s: float = 0.0

    def add(self, response: chat.Response) -> None:
        """What an action was worth."""
        self.reward += response.reward
        for name, reward in response.rewards.items():
            self.rewards[name] = self.rewards.get(name, 0.0) + reward
        self.truncated = self.truncated or response.truncated

    @property
    def token_ids(self) -> list[int]:
        """All so far."""
        return self.rollout().token_ids

    def rollout(self) -> Rollout:
        """As it is now."""
        return Rollout(list(self.turns), self.reward, dict(self.rewards), truncated=self.truncated)


class Episodes:
    """A ports.RolloutMaker: plays the episodes of one job.

    Args:
        spec: which has an environment.
        info: what that says of itself.
        environments: where it is played in.
        draws: what the policy says.
        tolerance: of the environment's failures.
        tokenizer: of the base model.
    """

    def __init__(
        self,
        spec: JobSpec,
        info: chat.EnvironmentInfo,
        *,
        environments: EnvironmentPort,
        draws: Draws,
        tolerance: Tolerance,
        tokenizer: Tokenizer,
    ) -> None:
        assert spec.environment is not None  # noqa: S101 - the caller's
        self._spec = spec
        self._name = spec.environment.name
        own = [spec.environment.max_turns, info.limits.max_turns]
        self._max_turns = min(limit for limit in own if limit)
        self._tools = template_tools(info.tools)
        self._environments = environments
        self._draws = draws
        self._tolerance = tolerance
        self._tokenizer = tokenizer
        at_once = info.limits.max_concurrent_episodes or MAX_EPISODES
        self._at_once = asyncio.Semaphore(min(at_once, MAX_EPISODES))

    async def group(
        self, number: int, source: types.AdapterSource, task: Task, attempt: int = 0
    ) -> Group | None:
        """The group of that number: episodes of one task and one seed; None: one was given up."""
        spec = self._spec
        path = ("group", number, task.id, *((attempt,) if attempt else ()))
        seed = derived_seed(spec.seed, "episode", *path)

        def params_of(index: int) -> Callable[[int], Params]:
            def of_attempt(tried: int) -> Params:
                def params(turn: int) -> types.SamplingParams:
                    # Another episode where the environment failed at this one: it might again.
                    one = ("turn", index, turn, *((tried,) if tried else ()))
                    return self._draws.training_params(derived_seed(spec.seed, *path, *one))

                return params

            return of_attempt

        with telemetry.span("job.group", number=number, policy_version=source.policy_version):
            played = await self._tolerance.group(
                partial(self._tolerated, task, source, seed, params_of(index), self._draws.newest)
                for index in range(spec.algorithm.group_size)
            )
        if played is None:
            return None
        rollouts = [one.rollout() for one in played]
        return Group(
            number=number,
            policy_version=oldest_version(rollouts),
            task=task,
            rollouts=rollouts,
            sample_s=max(one.sample_s for one in played),
            reward_s=max(one.reward_s for one in played),
            attempt=attempt,
        )

    async def evaluated(
        self, tasks: Sequence[Task], source: types.AdapterSource
    ) -> list[float | None]:
        """The rewards of one greedy episode of each task; None: it was given up."""
        params = self._draws.greedy_params()

        async def reward(task: Task) -> float | None:
            seed = derived_seed(self._spec.seed, "evaluation", task.id)
            played = await self._tolerance.group(
                [partial(self._tolerated, task, source, seed, lambda _: lambda _: params, None)]
            )
            return played[0].reward if played else None

        async with asyncio.TaskGroup() as group:
            playing = [group.create_task(reward(task)) for task in tasks]
        return [each.result() for each in playing]

    async def _tolerated(
        self,
        task: Task,
        source: types.AdapterSource,
        seed: int,
        params: Callable[[int], Params],
        newest: Newest | None,
    ) -> _Played:
        async with self._at_once:
            return await self._tolerance.call(
                f"an episode of task {task.id!r} of {self._name}",
                lambda tried: self._play(task, source, seed, params(tried), newest),
            )

    async def _play(
        self,
        task: Task,
        source: types.AdapterSource,
        seed: int,
        params: Params,
        newest: Newest | None,
    ) -> _Played:
        clock = asyncio.get_running_loop().time
        played = _Played()
        asked = clock()
        async with self._environments.episode(self._name, task.id, seed=seed) as episode:
            prompt = self._opening(task, episode.first.observation)
            num_calls = 0
            while True:
                answered = clock()
                played.reward_s += answered - asked
                (completion,) = await self._draws.completions(
                    task.id,
                    source,
                    [*played.token_ids, *prompt] if played.turns else prompt,
                    1,
                    params(len(played.turns)),
                    newest,
                )
                played.turns.append(Turn(prompt, completion))
                action = answer_of(completion.token_ids, self._tokenizer, num_calls=num_calls)
                num_calls += len(action.tool_calls)
                asked = clock()
                played.sample_s += asked - answered
                with _begun():
                    response = await episode.act(action)
                played.add(response)
                if response.done:
                    break
                if not response.observation:
                    raise EnvironmentFailed("it is not done, and shows nothing")
                prompt = self._next(completion.token_ids[-1], response.observation)
                if len(played.turns) == self._max_turns or not self._has_room(played, prompt):
                    played.truncated = True
                    with _begun():
                        last = await episode.give_up()
                    if last is not None:
                        played.add(last)
                    break
        played.reward_s += clock() - asked
        return played

    def _opening(self, task: Task, observation: Iterable[chat.Message]) -> list[int]:
        token_ids = self._tokenizer.render(_shown(observation), self._tools)
        if not token_ids:
            raise InvalidRequest(
                f"environment: task {task.id!r} of {self._name} shows nothing to begin with",
                field="environment",
                value=task.id,
            )
        return token_ids

    def _next(self, last_token: int, observation: Iterable[chat.Message]) -> list[int]:
        return self._tokenizer.follow(_shown(observation), last_token, self._tools)

    def _has_room(self, played: _Played, prompt: Sequence[int]) -> bool:
        """Whether the context takes what comes next and a token more."""
        most = self._draws.context_length
        return most is None or len(played.token_ids) + len(prompt) < most


@contextlib.contextmanager
def _begun() -> Iterator[None]:
    """An environment that goes away now takes an episode with it."""
    try:
        yield
    except EnvironmentUnavailable as error:
        raise RolloutLost(str(error)) from error


def _shown(observation: Iterable[chat.Message]) -> list[dict[str, Any]]:
    try:
        return template_messages(observation)
    except InvalidRequest as error:
        raise EnvironmentFailed(f"what it shows cannot be told to a model: {error}") from None
