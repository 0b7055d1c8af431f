"""Whether samplers and trainer make the same of the same token under the same version.

Only tokens that the version to be trained has drawn can be compared: the trainer has no other's
weights. So groups are looked at before they are trained on, and those that are early before the
step which makes them old. Groups with tokens of a sampler beyond the job's bound are drawn anew.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from rollmesh.job import Warned
from services.coordinator.batch import sequence, teaching

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from rollmesh.types import FloatArray
    from services.coordinator.groups import Group, Rollout
    from services.coordinator.learner import Learner
    from services.coordinator.ports import JobContext, Sampling

    Gaps = Mapping[str, NDArray[np.float64]]


def gaps(rollouts: Sequence[Rollout], logprobs: Sequence[FloatArray], version: int) -> Gaps:
    """|sampler − trainer| of each token that `version` drew, in nats, by the sampler's instance_id.

    `logprobs`: the trainer's, per rollout those of all its tokens but the first. What is no finite
    number is infinitely far from everything.
    """
    found: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for rollout, of_sequence in zip(rollouts, logprobs, strict=True):
        trainer = np.asarray(of_sequence, np.float64)[rollout.is_drawn()[1:]]
        with np.errstate(invalid="ignore"):  # inf − inf
            apart = np.abs(np.asarray(rollout.logprobs, np.float64) - trainer)
        apart[~np.isfinite(apart)] = np.inf
        start = 0
        for span in rollout.spans:
            if span.policy_version == version:
                found[span.sampler].append(apart[start : start + span.num_tokens])
            start += span.num_tokens
    return {sampler: np.concatenate(parts) for sampler, parts in found.items()}


def gap_metrics(
    groups: Sequence[Group], logprobs: Sequence[FloatArray], version: int
) -> dict[str, float]:
    """The largest and the mean gap in what was trained; none where nothing could be compared."""
    trained = [rollout for group in groups for rollout in group.rollouts]
    found = gaps(trained, logprobs, version)
    if not found:
        return {}
    apart = np.concatenate(list(found.values()))
    return {"logprob_gap_max": float(apart.max()), "logprob_gap_mean": float(apart.mean())}


class Agreement:
    """Holds a job's samplers to its `sampling.max_logprob_gap`, where it has one."""

    def __init__(
        self,
        context: JobContext,
        *,
        learner: Learner,
        sampling: Sampling,
        warn: Callable[[Warned], Awaitable[None]],
    ) -> None:
        self._job = context.name
        self._adapter = context.adapter
        self._algorithm = context.spec.algorithm
        self._bound = context.spec.sampling.max_logprob_gap
        self._learner = learner
        self._sampling = sampling
        self._warn = warn
        # By instance_id why. Grows by one for each sampler process that was beyond the bound.
        self._quarantined: dict[str, str] = dict(context.memory.get("agreement", {}))

    @property
    def is_asked_for(self) -> bool:
        """Whether the job has a bound."""
        return self._bound is not None

    @property
    def memory(self) -> Mapping[str, str]:
        """Whom to trust no more: groups that they drew may be kept, and too old to be compared."""
        return self._quarantined

    def begin(self) -> None:
        """Ask none of them, as before the interruption."""
        for sampler, reason in self._quarantined.items():
            self._sampling.quarantine(self._job, sampler, reason)

    async def reached(
        self,
        groups: Sequence[Group],
        version: int,
        again: Callable[[int], Awaitable[Group]],
    ) -> list[Group]:
        """`groups`, ready to be trained on at `version`.

        Those with tokens of a sampler beyond the bound are drawn `again`, by their numbers, and
        looked at like the first ones: it goes round once for each time that one is found.
        """
        groups = list(groups)
        looked_at: dict[int, Group] = {}
        while True:
            groups = await self._without_quarantined(groups, again)
            new = [
                group
                for group in teaching(groups, self._algorithm)
                if looked_at.get(group.number) is not group
            ]
            if not await self.look_at(new, version):
                return groups
            looked_at |= {group.number: group for group in new}

    async def look_at(self, groups: Sequence[Group], version: int) -> bool:
        """Quarantine each sampler that drew a token of `version` in `groups` beyond the bound.

        True: there are some, or it has been done before.
        """
        beyond = await self._beyond(groups, version)
        for sampler, gap in beyond.items():
            if sampler not in self._quarantined:
                await self._quarantine(sampler, version, gap)
        return bool(beyond)

    async def _beyond(self, groups: Sequence[Group], version: int) -> dict[str, float]:
        """The samplers beyond the bound, each with its largest gap."""
        assert self._bound is not None  # noqa: S101 - else nobody asks
        beyond: dict[str, float] = {}
        # No more at a time than a step has.
        for first in range(0, len(groups), self._algorithm.groups_per_step):
            found = [
                rollout
                for group in groups[first : first + self._algorithm.groups_per_step]
                for rollout in group.rollouts
                if any(span.policy_version == version for span in rollout.spans)
            ]
            if not found:
                continue
            logprobs = await self._learner.forward(version, [sequence(each) for each in found])
            for sampler, apart in gaps(found, logprobs, version).items():
                if apart.max() > max(self._bound, beyond.get(sampler, 0.0)):
                    beyond[sampler] = float(apart.max())
        return beyond

    async def _quarantine(self, sampler: str, version: int, gap: float) -> None:
        reason = (
            f"its log-probabilities of tokens of version {version} of {self._adapter} are up to "
            f"{gap:.3g} nats from the trainer's; sampling.max_logprob_gap is {self._bound:g}"
        )
        self._quarantined[sampler] = reason
        self._sampling.quarantine(self._job, sampler, reason)
        message = f"the sampler {sampler} is asked for nothing more by this job: {reason}"
        await self._warn(Warned(reason="LOGPROB_GAP", message=message))

    async def _without_quarantined(
        self, groups: Sequence[Group], again: Callable[[int], Awaitable[Group]]
    ) -> list[Group]:
        async def kept(group: Group) -> Group:
            while group.samplers() & self._quarantined.keys():
                group = await again(group.number)
            return group

        async with asyncio.TaskGroup() as tasks:
            found = [tasks.create_task(kept(group)) for group in groups]
        return [each.result() for each in found]
