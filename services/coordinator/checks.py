"""What CreateJob refuses of a job's teacher and of the completions that it is to learn."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from rollmesh.errors import InvalidRequest, NotFound
from rollmesh.names import parse_adapter
from rollmesh.types import PolicyRef
from services.coordinator.prompts import check_completions
from services.coordinator.supervised import check_lengths

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rollmesh.job import DistillationSpec, JobSpec
    from services.coordinator.base_models import BaseModels
    from services.coordinator.datasets import Task
    from services.coordinator.fleet.membership import Fleet
    from services.coordinator.ports import Tokenizer, Training


class Checks:
    """Of jobs that are not stored yet.

    Args:
        fleet: what is served.
        base_models: those that the mesh knows.
        training: knows the adapters.
        load_tokenizer: reads that of a base model; may block.
    """

    def __init__(
        self,
        fleet: Fleet,
        base_models: BaseModels,
        training: Training,
        load_tokenizer: Callable[[str], Tokenizer],
    ) -> None:
        self._fleet = fleet
        self._base_models = base_models
        self._training = training
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
