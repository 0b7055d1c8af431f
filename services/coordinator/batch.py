"""Finished groups to the data of one ForwardBackward.

A rollout of T tokens, read and drawn, is one datum of T − 1 positions: position i reads tokens 0..i
and predicts token i + 1. What the policy drew are the targets that count.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rollmesh.types import Datum
from services.coordinator.advantages import of_batch, token_weights
from services.coordinator.groups import at_drawn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rollmesh.job import AlgorithmSpec, JobSpec
    from services.coordinator.groups import Group, Rollout


def batch(groups: Sequence[Group], spec: JobSpec) -> list[Datum]:
    """One datum for each rollout of the groups that teach, in order. Weights average over all.

    With a teacher each token has an advantage of its own: that of the reward, and the coefficient
    times the log-probability by the teacher less that by the policy which drew it. In expectation
    over those draws the second part is −KL(policy ‖ teacher) and its gradient.
    """
    if spec.sft is not None:
        return _supervised(groups)
    algorithm = spec.algorithm
    rollouts = [(group, rollout) for group in groups for rollout in group.rollouts]
    weights = token_weights(
        algorithm.advantage,
        [rollout.num_drawn for _, rollout in rollouts],
        # Of a rollout of several turns it bounds nothing.
        max_tokens=spec.sampling.max_tokens if spec.environment is None else None,
    )
    each = of_batch(algorithm.advantage, [group.rewards for group in groups])
    judged = [
        advantage if difference is None else advantage + _coefficient(spec) * difference
        for advantage, difference in zip(each, _differences(groups), strict=True)
    ]
    taught = {group.number for group in teaching(groups, algorithm)}
    return [
        _datum(rollout, advantage=advantage, weight=weight)
        for (group, rollout), advantage, weight in zip(rollouts, judged, weights, strict=True)
        if group.number in taught
    ]


def teaching(groups: Sequence[Group], algorithm: AlgorithmSpec) -> list[Group]:
    """Those that a step is trained on.

    A group with equal rewards is left out where its gradient is exactly zero: not with a KL
    penalty, a teacher, or a baseline of the whole batch. Nor where that would leave nothing, for
    the step to be taken.
    """
    if algorithm.kl_coefficient > 0 or algorithm.advantage == "reinforce":
        return list(groups)
    return [
        group for group in groups if group.teacher_logprobs is not None or not equal_rewards(group)
    ] or list(groups)


def sequence(rollout: Rollout) -> Datum:
    """A rollout as it is read, with nothing to train on it."""
    tokens = np.asarray(rollout.token_ids, dtype=np.int32)
    return Datum(token_ids=tokens[:-1], target_token_ids=tokens[1:])


def equal_rewards(group: Group) -> bool:
    """Whether relative to each other its rollouts are all the same."""
    return min(group.rewards) == max(group.rewards)


def teacher_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """How far the policy that drew is from the teacher; nothing where there is none.

    The mean over tokens of the former's less the latter's log-probability estimates the KL
    divergence in nats.
    """
    found = [difference for difference in _differences(groups) if difference is not None]
    if not found:
        return {}
    return {"kl_teacher": -float(np.concatenate(found).mean())}


def _differences(groups: Sequence[Group]) -> list[np.ndarray | None]:
    """Of each rollout, by token, how much likelier the teacher finds it than the policy did."""
    found: list[np.ndarray | None] = []
    for group in groups:
        if group.teacher_logprobs is None:
            found += [None] * len(group.rollouts)
            continue
        found += [
            np.asarray(of_teacher, np.float64) - np.asarray(rollout.logprobs, np.float64)
            for rollout, of_teacher in zip(group.rollouts, group.teacher_logprobs, strict=True)
        ]
    return found


def _coefficient(spec: JobSpec) -> float:
    assert spec.distillation is not None  # noqa: S101 - else nobody judges
    return spec.distillation.coefficient


def _supervised(groups: Sequence[Group]) -> list[Datum]:
    """The data of cross-entropy: its plain sum with these weights is the mean over all tokens."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    weight = 1.0 / sum(rollout.num_drawn for rollout in rollouts)
    return [
        replace(sequence(rollout), weights=_of_targets(rollout, weight)) for rollout in rollouts
    ]


def _datum(rollout: Rollout, *, advantage: float | np.ndarray, weight: float) -> Datum:
    # Rounding in the engine may leave a log-probability a hair above 0.
    logprobs = np.minimum(_of_targets(rollout, rollout.logprobs), 0.0)
    return replace(
        sequence(rollout),
        weights=_of_targets(rollout, weight),
        sampling_logprobs=logprobs,
        advantages=_of_targets(rollout, advantage),
    )


def _of_targets(rollout: Rollout, values: Sequence[float] | np.ndarray | float) -> np.ndarray:
    """float32 [T − 1]: `values` at the positions that predict what was drawn, 0 at the others."""
    return at_drawn(rollout, values)[1:]
