"""What CreateJob refuses of a job's teacher, environment, reward, and completions to learn."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from rollmesh.chat import Message
from rollmesh.chat_template import template_messages, template_tools
from rollmesh.errors import InvalidRequest, NotFound
from rollmesh.names import parse_adapter
from rollmesh.types import PolicyRef, ScoreItem
from services.coordinator.judge import policy_of
from services.coordinator.prompts import check_completions, fill
from services.coordinator.supervised import check_lengths
from services.coordinator.tasks import check_environment, environment_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rollmesh.chat import EnvironmentInfo, Question
    from rollmesh.job import DistillationSpec, JobSpec
    from services.coordinator.base_models import BaseModels
    from services.coordinator.datasets import Task
    from services.coordinator.fleet.membership import Fleet
    from services.coordinator.ports import EnvironmentPort, RewardPort, Tokenizer, Training


class _Asked(Exception):
    """A judge is asked, and so the function takes its parameters."""


class Checks:
    """Of jobs that are not stored yet.

    Args:
        fleet: what is served.
        base_models: those that the mesh knows.
        training: knows the adapters.
        reward: where reward functions are tried out.
        environments: those that the reward service reaches.
        load_tokenizer: reads that of a base model; may block.
    """

    def __init__(
        self,
        fleet: Fleet,
        base_models: BaseModels,
        training: Training,
        reward: RewardPort,
        environments: EnvironmentPort,
        load_tokenizer: Callable[[str], Tokenizer],
    ) -> None:
        self._fleet = fleet
        self._base_models = base_models
        self._training = training
        self._reward = reward
        self._environments = environments
        self._load_tokenizer = load_tokenizer

    async def teacher(self, project: str, spec: JobSpec) -> None:
        """Refuse a teacher that cannot judge the policy.

        Raises:
            NotFound: no such adapter in the project, version, or base model.
            InvalidRequest: it is on another base model, or reads other tokens, or fewer.
        """
        distillation = spec.distillation
        if distillation is None:
            return
        if distillation.teacher_adapter:
            await self._teacher_adapter(project, spec.base_model, distillation)
        elif distillation.teacher_base_model not in {"", spec.base_model}:
            await self._teacher_base_model(spec.base_model, distillation.teacher_base_model)

    async def completions(self, spec: JobSpec, tasks: Sequence[Task]) -> None:
        """Refuse completions that cannot be learned.

        Raises:
            InvalidRequest: a template asks for what a task has not; a task is too long.
        """
        if spec.sft is None:
            return
        known = [trainer.info for trainer in self._fleet.trainers(spec.base_model)]
        max_length = min((info.max_length for info in known if info), default=None)

        def check() -> None:
            check_completions(spec, tasks)
            tokenizer = self._load_tokenizer(spec.base_model)
            check_lengths(spec, tasks, tokenizer, max_length=max_length)

        await asyncio.to_thread(check)

    async def environment(self, spec: JobSpec) -> EnvironmentInfo | None:
        """What the job's environment says of itself; None: it has none.

        Raises:
            NotFound, Unavailable: it is not there.
        """
        return await environment_of(spec, self._reward, self._environments)

    async def observations(self, spec: JobSpec, info: EnvironmentInfo | None, task: Task) -> None:
        """Refuse an environment whose observations the model's chat template cannot say.

        Raises:
            InvalidRequest: the template refuses them.
        """
        if info is None:
            return

        def check() -> None:
            tokenizer = self._load_tokenizer(spec.base_model)
            opening = task.messages or (Message("user", "?"),)
            tools = template_tools(info.tools)
            tokenizer.render(template_messages(opening), tools)
            if info.has_episodes:
                seen = Message("tool" if "tool" in info.observation_kinds else "user", "?")
                tokenizer.follow(template_messages([seen]), None, tools)

        try:
            await asyncio.to_thread(check)
        except InvalidRequest as error:
            raise InvalidRequest(
                f"environment.name: {info.name!r} on {spec.base_model!r}: {error}",
                field="environment.name",
                value=info.name,
            ) from None

    async def reward(self, project: str, spec: JobSpec, task: Task) -> None:
        """Refuse what cannot score: an empty answer to `task` is, up to where a judge is asked.

        Raises:
            InvalidRequest: the function, its parameters or the reference.
            NotFound: a judge's adapter or base model, or the environment.
            Unavailable: the reward service or the environment is away.
        """
        if spec.reward is None:
            return
        if spec.reward.environment:
            await check_environment(
                spec.reward.environment, self._reward, field="reward.environment"
            )
            return
        reference = fill(spec.reward.reference, task, field="reward.reference")

        async def judge(question: Question) -> str:
            policy = policy_of(question, project, spec.base_model)
            if not question.adapter:
                field = "reward.parameters.base_model"
                self._base_models.check(policy.base_model, field=field, refusal=NotFound)
            else:
                await self._training.resolve(policy)
            raise _Asked

        try:
            await self._reward.score_each(
                spec.reward.function,
                spec.reward.parameters,
                [ScoreItem("", reference)],
                judge=judge,
            )
        except _Asked:
            return
        except InvalidRequest as error:
            field = f"reward.{error.context.get('field', '')}".rstrip(".")
            raise InvalidRequest(f"reward: {error}", **{**error.context, "field": field}) from None

    async def _teacher_adapter(
        self, project: str, base_model: str, distillation: DistillationSpec
    ) -> None:
        field, name = "distillation.teacher_adapter", distillation.teacher_adapter
        owner, _ = parse_adapter(name, field=field)
        if owner != project:
            # The same answer whether it exists or not: projects cannot see each other.
            raise NotFound(f"{field}: there is no {name}", resource=name)
        policy = PolicyRef(adapter=name, policy_version=distillation.teacher_version)
        its_own, _ = await self._training.resolve(policy)
        if its_own != base_model:
            raise InvalidRequest(
                f"{field}: {name} is on {its_own!r}, and the job on {base_model!r}",
                field=field,
                value=name,
                allowed=f"an adapter on {base_model!r}",
            )

    async def _teacher_base_model(self, base_model: str, teacher: str) -> None:
        field = "distillation.teacher_base_model"
        self._base_models.check(teacher, field=field, refusal=NotFound)
        of_both = [
            (await asyncio.to_thread(self._load_tokenizer, each)).vocabulary
            for each in (base_model, teacher)
        ]
        # It is given token ids: they have to mean the same to it.
        if of_both[0] != of_both[1]:
            raise InvalidRequest(
                f"{field}: {teacher!r} and {base_model!r} have different vocabularies",
                field=field,
                value=teacher,
                allowed=f"a base model with the tokenizer of {base_model!r}",
            )
        drawn = max(self._contexts(base_model), default=None)
        read = min(self._contexts(teacher), default=None)
        if drawn is not None and read is not None and read < drawn:
            raise InvalidRequest(
                f"{field}: {teacher!r} reads {read} tokens, and {base_model!r} draws up to {drawn}",
                field=field,
                value=teacher,
                allowed=f"a base model with a context of {drawn} tokens",
            )

    def _contexts(self, base_model: str) -> list[int]:
        """Of its samplers, as far as they have said it."""
        infos = [sampler.info for sampler in self._fleet.samplers(base_model)]
        return [info.max_length for info in infos if info]
