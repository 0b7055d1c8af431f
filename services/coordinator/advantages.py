"""Advantages of a batch's rollouts, and how much each of their tokens weighs in the loss.

r is the reward of one of G rollouts of the same prompt, |o| its completion's number of tokens.
ForwardBackward sums over all tokens of a batch, so every average is in the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

OfGroup: TypeAlias = Literal["grpo", "dr_grpo", "rloo"]
Estimator: TypeAlias = OfGroup | Literal["reinforce"]

STD_EPSILON = 1e-6


def of_batch(estimator: Estimator, rewards: Sequence[Sequence[float]]) -> FloatArray:
    """The advantage of each rollout of a step, float64 [N], of the rewards of each of its groups.

    reinforce: (r − mean) / (std + 1e-6) over all N rollouts of the step, with the population's
    standard deviation; all 0 where all rewards are equal. The global batch normalization of
    REINFORCE++ (arXiv:2501.03262), whose KL term in the reward is left out here: the
    penalty of kl_coefficient is in the loss.

    The others compare within each group: see `of_group`.
    """
    if estimator != "reinforce":
        return np.concatenate([of_group(estimator, of_one) for of_one in rewards])
    reward = np.array([each for of_one in rewards for each in of_one], dtype=np.float64)
    if reward.min() == reward.max():
        return np.zeros_like(reward)
    normalized: FloatArray = (reward - reward.mean()) / (reward.std() + STD_EPSILON)
    return normalized


def of_group(estimator: OfGroup, rewards: Sequence[float]) -> FloatArray:
    """The advantage of each rollout of one group, float64 [G]; all 0 where all rewards are equal.

    grpo: (r − mean) / (std + 1e-6), with the sample standard deviation (divisor G − 1).
    DeepSeekMath (arXiv:2402.03300, §4.1.2) leaves divisor and epsilon open; these are verl's.

    dr_grpo: r − mean. "Understanding R1-Zero-Like Training" (arXiv:2503.20783).

    rloo: r − mean of the other G − 1. "Back to Basics" (arXiv:2402.14740).
    """
    reward = np.asarray(rewards, dtype=np.float64)
    if reward.min() == reward.max():
        # Exactly 0: a mean that is off by a rounding error would be blown up by the epsilon.
        return np.zeros_like(reward)
    centred: FloatArray = reward - reward.mean()
    if estimator == "grpo":
        centred /= reward.std(ddof=1) + STD_EPSILON
    elif estimator == "rloo":
        # r − (Σ − r)/(G − 1) = (r − mean)·G/(G − 1)
        centred *= len(reward) / (len(reward) - 1)
    return centred


def token_weights(
    estimator: Estimator, lengths: Sequence[int], *, max_tokens: int | None
) -> FloatArray:
    """The weight of every token of each rollout of a batch, float64 [N], by completion lengths.

    grpo: 1 / (N·|o|): a rollout's tokens are averaged, then the rollouts (DeepSeekMath, eq. 3).

    dr_grpo, rloo, reinforce: 1 / (N·L): a rollout's tokens are summed, so that a long rollout is
    not pushed less per token than a short one, then the rollouts are averaged. L is the same for
    all tokens: max_tokens (as Dr. GRPO's own code divides by the generation budget), or where there
    is none the batch's longest completion. RLOO's paper has L = 1; a constant changes the
    gradient's size, not its direction, and with it max_grad_norm means the same for every
    estimator.
    """
    length = np.asarray(lengths, dtype=np.float64)
    if estimator == "grpo":
        return 1.0 / (len(length) * length)
    longest = float(max_tokens or length.max())
    return np.full(len(length), 1.0 / (len(length) * longest))
