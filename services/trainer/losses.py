"""The losses, as protos/ defines them, and the metrics of a batch.

p is the log-probability that the adapter gives a target, q its sampling_logprobs, r the base
model's, A its advantage, w its weight. Legend: B sequences, T positions.
"""

# ruff: noqa: N803 - shape suffixes

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from rollmesh.types import Datum, FloatArray, LossConfig


def losses(
    config: LossConfig,
    logprobs_BT: Tensor,
    *,
    weights_BT: Tensor,
    sampling_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    base_logprobs_BT: Tensor | None,
) -> Tensor:
    """The loss of each sequence [B], a plain sum over its positions.

    A position of weight 0 adds exactly 0 to it and to every gradient, whatever its other values.
    base_logprobs_BT is read where `config` asks for a penalty.
    """
    counts = weights_BT > 0
    # Masked before exp: a masked position must not overflow, since 0 × inf is NaN.
    p = torch.where(counts, logprobs_BT, 0.0)
    if config.loss == "cross_entropy":
        terms = -p
    else:
        terms = -torch.exp(p - torch.where(counts, sampling_logprobs_BT, 0.0)) * advantages_BT
    if base_logprobs_BT is not None and config.kl_coefficient:
        difference = torch.where(counts, base_logprobs_BT, 0.0) - p
        terms = terms + config.kl_coefficient * (torch.expm1(difference) - difference)
    return (weights_BT * terms).sum(dim=1)


def metrics(
    config: LossConfig,
    data: Sequence[Datum],
    *,
    losses: Sequence[float],
    logprobs: Sequence[FloatArray],
    base_logprobs: Sequence[FloatArray] | None,
) -> dict[str, float]:
    """The metrics of TrainingService.ForwardBackward; means over positions of weight > 0, or 0."""
    counts = np.concatenate(
        [
            np.ones(len(datum.token_ids), bool) if datum.weights is None else datum.weights > 0
            for datum in data
        ]
    )

    def counted(arrays: Sequence[FloatArray]) -> NDArray[np.float64]:
        values: NDArray[np.float64] = np.concatenate(arrays)[counts].astype(np.float64)
        return values

    num_tokens = int(counts.sum())
    found = {"loss": float(np.sum(losses, dtype=np.float64)), "num_tokens": float(num_tokens)}
    p = counted(logprobs)
    if config.loss == "importance_sampling":
        difference = p - counted(
            [d.sampling_logprobs for d in data if d.sampling_logprobs is not None]
        )
        ratio = np.exp(difference)
        found["kl_sampler"] = float(_k3(difference).sum()) / max(num_tokens, 1)
        found["ratio_mean"] = float(ratio.sum()) / max(num_tokens, 1)
        found["ratio_max"] = float(ratio.max(initial=0.0))
    if base_logprobs is not None:
        found["kl_base"] = float(_k3(counted(base_logprobs) - p).sum()) / max(num_tokens, 1)
    return found


def _k3(difference: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(d) − d − 1, the estimator of KL."""
    estimate: NDArray[np.float64] = np.expm1(difference) - difference
    return estimate
