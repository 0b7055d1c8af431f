"""Finished groups to the data of one ForwardBackward.

A rollout of P prompt and C completion tokens is one datum of T = P + C − 1 positions: position i
reads tokens 0..i and predicts token i + 1, so the completion's tokens are the last C targets.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rollmesh.types import Datum
from services.coordinator.advantages import of_batch, token_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rollmesh.job import AlgorithmSpec, JobSpec
    from rollmesh.types import Completion
    from services.coordinator.rollouts import Group


def batch(groups: Sequence[Group], spec: JobSpec) -> list[Datum]:
    """One datum for each rollout of the groups that teach, in order. Weights average over all.

    With a teacher each token has an advantage of its own: that of the reward, and the coefficient
    times the log-probability by the teacher less that by the policy which drew it. In expectation
    over those draws the second part is −KL(policy ‖ teacher) and its gradient.
    """
    if spec.sft is not None:
        return _supervised(groups)
    algorithm = spec.algorithm
    lengths = [
        len(completion.token_ids) for group in groups for completion in group.drawn.completions
    ]
    weights = token_weights(algorithm.advantage, lengths, max_tokens=spec.sampling.max_tokens)
    each = of_batch(algorithm.advantage, [group.rewards for group in groups])
    judged = [
        advantage if difference is None else advantage + _coefficient(spec) * difference
        for advantage, difference in zip(each, _differences(groups), strict=True)
    ]
    rollouts = [(group, completion) for group in groups for completion in group.drawn.completions]
    taught = {group.number for group in teaching(groups, algorithm)}
    return [
        _datum(group, completion, advantage=advantage, weight=weight)
        for (group, completion), advantage, weight in zip(rollouts, judged, weights, strict=True)
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


def sequence(group: Group, completion: Completion) -> Datum:
    """A rollout as it is read, with nothing to train on it."""
    tokens = np.asarray([*group.drawn.prompt_token_ids, *completion.token_ids], dtype=np.int32)
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
        completions = group.drawn.completions
        if group.teacher_logprobs is None:
            found += [None] * len(completions)
            continue
        found += [
            np.asarray(of_teacher, np.float64) - np.asarray(completion.logprobs, np.float64)
            for completion, of_teacher in zip(completions, group.teacher_logprobs, strict=True)
        ]
    return found


def _coefficient(spec: JobSpec) -> float:
    assert spec.distillation is not None  # noqa: S101 - else nobody judges
    return spec.distillation.coefficient


def _supervised(groups: Sequence[Group]) -> list[Datum]:
    """The data of cross-entropy: its plain sum with these weights is the mean over all tokens."""
    completions = [
        (group, completion) for group in groups for completion in group.drawn.completions
    ]
    weight = 1.0 / sum(len(completion.token_ids) for _, completion in completions)
    data = []
    for group, completion in completions:
        read = sequence(group, completion)
        data.append(replace(read, weights=_of_completion(read, group, weight)))
    return data


def _datum(
    group: Group, completion: Completion, *, advantage: float | np.ndarray, weight: float
) -> Datum:
    read = sequence(group, completion)
    # Rounding in the engine may leave a log-probability a hair above 0.
    logprobs = np.minimum(_of_completion(read, group, completion.logprobs), 0.0)
    return replace(
        read,
        weights=_of_completion(read, group, weight),
        sampling_logprobs=logprobs,
        advantages=_of_completion(read, group, advantage),
    )


def _of_completion(
    read: Datum, group: Group, values: Sequence[float] | np.ndarray | float
) -> np.ndarray:
    """`values` at the positions that predict the completion, 0 at those of the prompt."""
    array = np.zeros(len(read.token_ids), dtype=np.float32)
    array[len(group.drawn.prompt_token_ids) - 1 :] = values
    return array
