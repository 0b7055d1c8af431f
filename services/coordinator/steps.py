"""The optimizer steps of one job, on groups that are finished; also one that was interrupted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh.errors import AlreadyExists, FailedPrecondition
from services.coordinator.agreement import gap_metrics
from services.coordinator.batch import batch, teacher_metrics, teaching
from services.coordinator.metrics import of_groups, of_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rollmesh import types
    from rollmesh.job import JobSpec
    from services.coordinator.agreement import Agreement
    from services.coordinator.groups import Group
    from services.coordinator.learner import Learner, Progress
    from services.coordinator.metrics import Phases

    Metrics = dict[str, float]


class Steps:
    """Takes them. `agreement` looks at what would be too old to be looked at after a step."""

    def __init__(self, spec: JobSpec, learner: Learner, agreement: Agreement) -> None:
        self._spec = spec
        self._algorithm = spec.algorithm
        self._learner = learner
        self._agreement = agreement

    async def take(
        self,
        step: int,
        groups: Sequence[Group],
        waiting: Callable[[], Sequence[Group]],
        phases: Phases,
    ) -> tuple[types.AdapterSource, Metrics]:
        """Step `step` on `groups`: the version that it makes, which is live, and what to tell.

        `waiting`: the groups that are ready for later steps.
        """
        oldest = min(group.policy_version for group in groups)
        # The buffer's promise, and what was kept by a loop before this one has to hold to it too.
        assert step - oldest <= self._algorithm.max_staleness, (step, oldest)  # noqa: S101
        with phases.phase("forward_backward"):
            result = await self._learner.forward_backward(step, self._batch(groups))
        metrics = await self._optimized(step, waiting, phases)
        metrics = of_trainer(result.metrics, metrics) | self._told(step, groups, result, phases)
        return await self._learner.go_live(step + 1, phases), metrics

    async def finish(
        self,
        step: int,
        progress: Progress,
        groups: Sequence[Group],
        waiting: Sequence[Group],
        phases: Phases,
    ) -> tuple[Metrics, bool]:
        """Finish step `step`, whose gradients are journaled; what to tell, and whether it is all.

        It is all where `groups`, what was kept of those that it was trained on, is complete: the
        same op is answered again.
        """
        result = None
        if len(groups) == self._algorithm.groups_per_step:
            result = await self._answered_again(step, groups)
        metrics: Metrics = {}
        if progress == "gradients_pending":
            metrics = await self._optimized(step, lambda: waiting, phases)
        elif result is not None:
            metrics = dict(await self._learner.optim_step(step))
        if result is not None:
            metrics = of_trainer(result.metrics, metrics)
            metrics |= self._told(step, groups, result, phases)
        await self._learner.go_live(step + 1, phases)
        return metrics, result is not None

    async def _answered_again(
        self, step: int, groups: Sequence[Group]
    ) -> types.ForwardBackwardResult | None:
        try:
            return await self._learner.forward_backward(step, self._batch(groups))
        except (AlreadyExists, FailedPrecondition):
            # The answer is kept no longer, or another build makes another batch of the groups.
            return None

    async def _optimized(
        self, step: int, waiting: Callable[[], Sequence[Group]], phases: Phases
    ) -> Metrics:
        if self._agreement.is_asked_for:
            with phases.phase("agreement"):
                await self._agreement.look_at(waiting(), step)
        with phases.phase("optim_step"):
            return dict(await self._learner.optim_step(step))

    def _batch(self, groups: Sequence[Group]) -> list[types.Datum]:
        return batch(groups, self._spec)

    def _told(
        self,
        step: int,
        groups: Sequence[Group],
        result: types.ForwardBackwardResult,
        phases: Phases,
    ) -> Metrics:
        """What there is to tell of the groups that a step was trained on."""
        phases.add("sample", sum(group.sample_s for group in groups) / len(groups))
        phases.add("reward", sum(group.reward_s for group in groups) / len(groups))
        taught = teaching(groups, self._algorithm)
        metrics = of_groups(groups, self._spec, step=step) | teacher_metrics(groups)
        metrics |= gap_metrics(taught, result.logprobs, step)
        if self._algorithm.max_group_replacements:
            metrics["groups_replaced"] = float(sum(group.attempt for group in groups))
        return metrics
