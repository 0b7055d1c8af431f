"""Finished groups to the data of one ForwardBackward.

A rollout of P prompt and C completion tokens is one datum of T = P + C − 1 positions: position i
reads tokens 0..i and predicts token i + 1, so the completion's tokens are the last C targets.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rollmesh.types import Datum
from services.coordinator.advantages import advantages, token_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rollmesh.job import AlgorithmSpec
    from rollmesh.types import Completion
    from services.coordinator.rollouts import Group


def batch(
    groups: Sequence[Group], algorithm: AlgorithmSpec, *, max_tokens: int | None
) -> list[Datum]:
    """One datum for each rollout of the groups that teach, in order. Weights average over all."""
    rollouts = [(group, completion) for group in groups for completion in group.drawn.completions]
    lengths = [len(completion.token_ids) for _, completion in rollouts]
    weights = token_weights(algorithm.advantage, lengths, max_tokens=max_tokens)
    each = np.concatenate([advantages(algorithm.advantage, group.rewards) for group in groups])
    taught = {group.number for group in teaching(groups, algorithm)}
    return [
        _datum(group, completion, advantage=advantage, weight=weight)
        for (group, completion), advantage, weight in zip(rollouts, each, weights, strict=True)
        if group.number in taught
    ]


def teaching(groups: Sequence[Group], algorithm: AlgorithmSpec) -> list[Group]:
    """Those that a step is trained on.

    Where there is no KL penalty, a group with equal rewards is left out: its gradient is exactly
    zero. Not so where that would leave nothing, for the step to be taken.
    """
    if algorithm.kl_coefficient > 0:
        return list(groups)
    return [group for group in groups if not equal_rewards(group)] or list(groups)


def sequence(group: Group, completion: Completion) -> Datum:
    """A rollout as it is read, with nothing to train on it."""
    tokens = np.asarray([*group.drawn.prompt_token_ids, *completion.token_ids], dtype=np.int32)
    return Datum(token_ids=tokens[:-1], target_token_ids=tokens[1:])


def equal_rewards(group: Group) -> bool:
    """Whether the group teaches nothing: relative to each other its rollouts are all the same."""
    return min(group.rewards) == max(group.rewards)


def _datum(group: Group, completion: Completion, *, advantage: float, weight: float) -> Datum:
    read = sequence(group, completion)
    num_masked = len(group.drawn.prompt_token_ids) - 1

    def of_completion(values: Sequence[float] | float) -> np.ndarray:
        array = np.zeros(len(read.token_ids), dtype=np.float32)
        array[num_masked:] = values
        return array

    return replace(
        read,
        weights=of_completion(weight),
        # Rounding in the engine may leave a log-probability a hair above 0.
        sampling_logprobs=np.minimum(of_completion(completion.logprobs), 0.0),
        advantages=of_completion(advantage),
    )
