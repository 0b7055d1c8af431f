"""The teacher of on-policy distillation: what another policy says of each token that was drawn.

One version of it judges for the whole life of the job. The store holds it from the job's creation
to its end, and has written down which it is.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any

from rollmesh.errors import FailedPrecondition, InternalError, InvalidRequest, NotFound
from rollmesh.names import parse_job
from rollmesh.types import PolicyRef

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rollmesh import types
    from services.coordinator.groups import Group, Rollout
    from services.coordinator.ports import JobContext, Sampling, Training
    from services.coordinator.retry import Outage

MAX_CONCURRENT = 256
"""Sequences of one job that are judged at once: enough to fill a sampler."""


@dataclass(frozen=True, slots=True)
class _Policy:
    """What judges. `source` None: `base_model` itself."""

    base_model: str
    source: types.AdapterSource | None


class Distillation:
    """A ports.Teacher.

    Args:
        context: of a job that has a teacher.
        training: knows the versions.
        sampling: who computes.
        outage: of the samplers.
    """

    def __init__(
        self,
        context: JobContext,
        *,
        training: Training,
        sampling: Sampling,
        outage: Outage,
    ) -> None:
        assert context.spec.distillation is not None  # noqa: S101 - the caller's
        self._spec = context.spec
        self._distillation = context.spec.distillation
        self._job = context.name
        self._project, _ = parse_job(context.name)
        self._training = training
        self._sampling = sampling
        self._outage = outage
        self._known: Mapping[str, Any] = context.memory.get("teacher", {})
        self._policy: _Policy | None = None
        self._at_once = asyncio.Semaphore(MAX_CONCURRENT)

    @property
    def memory(self) -> Mapping[str, Any]:
        """Its version with digest and base model, JSON."""
        return self._known

    async def begin(self) -> None:
        """Look up the policy.

        Raises:
            FailedPrecondition: it was deleted.
        """
        distillation = self._distillation
        if not distillation.teacher_adapter:
            base_model = distillation.teacher_base_model or self._spec.base_model
            self._policy = _Policy(base_model, None)
            return
        version = self._known["policy_version"]
        policy = PolicyRef(adapter=distillation.teacher_adapter, policy_version=version)
        try:
            base_model, source = await self._training.resolve(policy)
        except NotFound as error:
            raise self._gone(f"is not there any more: {error}") from error
        assert source is not None  # noqa: S101 - the reference names an adapter
        if (base_model, source.digest) != (self._known["base_model"], self._known["digest"]):
            raise self._gone("was deleted and made anew")
        self._policy = _Policy(base_model, source)

    def _gone(self, what: str) -> FailedPrecondition:
        adapter, version = self._distillation.teacher_adapter, self._known["policy_version"]
        return FailedPrecondition(
            f"distillation.teacher_adapter: {adapter}, version {version}, {what}", resource=adapter
        )

    async def logprobs(self, group: Group) -> list[Sequence[float]]:
        """Of each rollout the log-probability of each token that it drew, at temperature 1."""
        async with self._outage.noticed() as lost, asyncio.TaskGroup() as tasks:
            judged = [
                tasks.create_task(self._of_rollout(rollout, lost)) for rollout in group.rollouts
            ]
        return [each.result() for each in judged]

    async def _of_rollout(self, rollout: Rollout, lost: Any) -> Sequence[float]:
        token_ids, drawn = rollout.token_ids, rollout.is_drawn()
        async with self._at_once:
            try:
                found = await self._computed(token_ids, lost)
            except InvalidRequest as error:
                if not drawn[-1] or error.context.get("field") != "token_ids":
                    raise
                # It fills the context, of which samplers compute all but the last token, however it
                # ended: of that the teacher says what the policy said.
                found = [*await self._computed(token_ids[:-1], lost), rollout.logprobs[-1]]
        return list(compress(found, drawn))

    async def _computed(self, token_ids: Sequence[int], lost: Any) -> Sequence[float]:
        assert self._policy is not None  # noqa: S101 - begun before anything is drawn
        found = await self._sampling.compute_logprobs(
            self._project,
            self._policy.base_model,
            self._policy.source,
            token_ids,
            job=self._job,
            lost=lost,
            priority=self._spec.priority,
        )
        if len(found.logprobs) != len(token_ids):
            raise InternalError(
                f"log-probabilities of {len(token_ids)} tokens were asked for, "
                f"{len(found.logprobs)} came"
            )
        return found.logprobs
