"""Groups of rollouts: a task's prompt, its completions from one version of the policy, its rewards.

Everything random is a function of the job's seed and the group's number, so a job that is started
again goes on with the tasks and seeds that it would have had.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rollmesh import telemetry, types
from rollmesh.errors import InternalError, InvalidRequest
from rollmesh.names import parse_job
from services.coordinator.identity import check_identity
from services.coordinator.prompts import fill, prompt_token_ids

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rollmesh.job import JobSpec
    from services.coordinator.datasets import Task
    from services.coordinator.newest import Newest
    from services.coordinator.ports import RewardPort, Sampling, Tokenizer
    from services.coordinator.retry import Outage, Patience
    from services.coordinator.versions import Versions


@dataclass(frozen=True, slots=True)
class Drawn:
    """Completions of one task's prompt."""

    task: Task
    prompt_token_ids: Sequence[int]
    completions: Sequence[types.Completion]


@dataclass(frozen=True, slots=True)
class Group:
    """What one training step needs of one prompt. `rewards` are in the order of the completions.

    `policy_version`: the oldest that drew a token of it. `rewards`: 0 where the job has none.
    `attempt`: how many groups of the same number this one replaces. `teacher_logprobs`: by
    completion, of each of its tokens; None: there is no teacher.
    """

    number: int
    policy_version: int
    drawn: Drawn
    rewards: Sequence[float]
    sample_s: float
    reward_s: float
    attempt: int = 0
    teacher_logprobs: Sequence[Sequence[float]] | None = None


class Rollouts:
    """Draws and scores completions for one job."""

    def __init__(
        self,
        spec: JobSpec,
        job: str,
        *,
        sampling: Sampling,
        reward: RewardPort,
        sampler_outage: Outage,
        reward_patience: Patience,
        tokenizer: Tokenizer,
        versions: Versions,
    ) -> None:
        self._spec = spec
        self._job = job
        self._project, _ = parse_job(job)
        self._sampling = sampling
        self._reward = reward
        self._sampler_outage = sampler_outage
        self._reward_patience = reward_patience
        self._tokenizer = tokenizer
        self._versions = versions

    async def group(
        self, number: int, source: types.AdapterSource, task: Task, attempt: int = 0
    ) -> Group:
        """The group of that number, sampled from `source` or what follows it, and scored."""
        clock = asyncio.get_running_loop().time
        spec = self._spec
        again = (attempt,) if attempt else ()
        with telemetry.span("job.group", number=number, policy_version=source.policy_version):
            start = clock()
            drawn = await self.draw(
                task,
                source,
                spec.algorithm.group_size,
                types.SamplingParams(
                    max_tokens=spec.sampling.max_tokens,
                    temperature=spec.sampling.temperature,
                    top_k=spec.sampling.top_k,
                    top_p=spec.sampling.top_p,
                    min_p=spec.sampling.min_p,
                    stop=tuple(spec.sampling.stop),
                    seed=derived_seed(spec.seed, "group", number, task.id, *again),
                    logprobs_kind=spec.sampling.logprobs_kind,
                ),
                newest=self._versions.newest,
            )
            sampled = clock()
            return Group(
                number=number,
                policy_version=min(
                    span.policy_version
                    for completion in drawn.completions
                    for span in completion.spans
                ),
                drawn=drawn,
                rewards=await self.score([drawn]),
                sample_s=sampled - start,
                reward_s=clock() - sampled,
                attempt=attempt,
            )

    async def draw(
        self,
        task: Task,
        source: types.AdapterSource,
        num_completions: int,
        params: types.SamplingParams,
        newest: Newest | None = None,
    ) -> Drawn:
        """Completions of `task`, every token of which `source` produced.

        Where they follow `newest` it may have been a later version too.

        Raises:
            InvalidRequest: the task makes no prompt, or one that the sampler refuses.
            InternalError: another policy was sampled.
        """
        prompt = prompt_token_ids(self._spec.prompt, task, self._tokenizer)
        try:
            async with self._sampler_outage.noticed() as lost:
                completions = await self._sampling.sample(
                    self._project,
                    self._spec.base_model,
                    source,
                    prompt,
                    num_completions,
                    params,
                    lost=lost,
                    newest=newest,
                    job=self._job,
                    priority=self._spec.priority,
                )
        except InvalidRequest as error:
            raise InvalidRequest(
                f"task {task.id!r}, whose prompt has {len(prompt)} tokens: {error}",
                **error.context,
            ) from error
        possible = {source.policy_version: source.digest}
        if newest is not None:
            possible |= self._versions.since(source)
        check_identity(completions, source, num_completions, possible)
        return Drawn(task, prompt, completions)

    async def score(self, all_drawn: Sequence[Drawn]) -> list[float]:
        """The rewards of all completions, in order; 0 where the job has no reward.

        Raises:
            InvalidRequest: the reward function refuses its parameters or a completion.
        """
        reward = self._spec.reward
        if reward is None:
            return [0.0 for drawn in all_drawn for _ in drawn.completions]
        items = [item for drawn in all_drawn for item in self._items(drawn, reward.reference)]
        rewards = await self._reward_patience.call(
            lambda: self._reward.score(reward.function, reward.parameters, items)
        )
        if len(rewards) != len(items):
            raise InternalError(f"the reward service scored {len(rewards)} of {len(items)} items")
        return rewards

    def _items(self, drawn: Drawn, template: str) -> list[types.ScoreItem]:
        reference = fill(template, drawn.task, field="reward.reference")
        prompt = self._tokenizer.decode(drawn.prompt_token_ids)
        return [
            types.ScoreItem(
                completion=self._tokenizer.decode(completion.token_ids),
                reference=reference,
                prompt=prompt,
            )
            for completion in drawn.completions
        ]


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
