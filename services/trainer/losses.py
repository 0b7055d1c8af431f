"""The losses, as protos/ and docs/losses.md define them, and the metrics of a batch.

p is the log-probability that the adapter gives a target at the config's temperature, q its
sampling_logprobs, b the base model's, A its advantage, w its weight. Everything is computed in
float64: a ratio times an advantage may pass what float32 holds while the loss does not.
Legend: B sequences, T positions, V vocabulary.
"""

# ruff: noqa: N803, N806 - shape suffixes, and A as the papers have it

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rollmesh.types import CLIP_RANGES
from services.trainer.sequences import guarded_fraction, unguarded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from rollmesh.types import Datum, FloatArray, IntArray, LossConfig

    Flags = NDArray[np.bool_]

DEFAULT_BETA = 0.05
DEFAULT_MAX_RATIO = 2.0
"""Of stable_reinforce."""
# Values of a block of softmax: what `entropies` needs at a time, besides the logits.
_MAX_BLOCK_VALUES = 2**22


def clip_range(config: LossConfig) -> tuple[float, float]:
    """Bounds of the ratio under `config`, whose loss is one that clips."""
    low, high = CLIP_RANGES[config.loss]
    return (
        low if config.clip_low_threshold is None else config.clip_low_threshold,
        high if config.clip_high_threshold is None else config.clip_high_threshold,
    )


def losses(
    config: LossConfig,
    logprobs_BT: Tensor,
    *,
    weights_BT: Tensor,
    sampling_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    base_logprobs_BT: Tensor | None,
    sequence_ids_BT: IntArray | None = None,
) -> Tensor:
    """The loss of each sequence, float64 [B], a plain sum over its positions.

    A position of weight 0 adds exactly 0 to it and to every gradient, whatever its other values.
    A row's loss has the same bits whatever rows stand beside it and however far it is padded.
    base_logprobs_BT is read where `config` asks for a penalty, sequence_ids_BT by stable_reinforce;
    None: each row is one. Where the loss, or a gradient, passes what its type holds it is infinite
    or NaN.
    """
    counts = weights_BT != 0
    is_guarded = config.loss == "stable_reinforce"
    if is_guarded:
        log_ratios_BT = logprobs_BT.detach().double() - sampling_logprobs_BT.double()
        counts = unguarded(config, counts, log_ratios_BT, sequence_ids_BT)

    def counted(values_BT: Tensor) -> Tensor:
        # Masked before anything else: 0 × inf is NaN, also in a gradient.
        return torch.where(counts, values_BT, 0.0).double()

    p, q, A = counted(logprobs_BT), counted(sampling_logprobs_BT), counted(advantages_BT)
    terms = _stable_reinforce(config, p, q, A) if is_guarded else _terms(config, p, q, A, counts)
    if base_logprobs_BT is not None and config.kl_coefficient:
        difference = counted(base_logprobs_BT) - p
        terms = terms + config.kl_coefficient * (torch.expm1(difference) - difference)
    return _row_sums(counted(weights_BT) * terms)


def _terms(config: LossConfig, p: Tensor, q: Tensor, A: Tensor, counts: Tensor) -> Tensor:
    """What each position adds to the loss per unit of weight [B, T].

    importance_sampling and ppo: arXiv 1707.06347 (eq. 6 and 7). cispo: arXiv 2506.13585
    (MiniMax-M1). dro: arXiv 2405.19107, the policy's part, the value function's being in A.
    gspo: arXiv 2507.18071, the token variant, a datum being the sequence.
    """
    log_ratio = p - q
    if config.loss == "dro":
        beta = DEFAULT_BETA if config.beta is None else config.beta
        return -(p * A - 0.5 * beta * log_ratio**2)
    if config.loss == "cispo":
        return -torch.exp(log_ratio.detach()).clamp(*clip_range(config)) * p * A
    if config.loss == "cross_entropy":
        if config.max_importance_ratio is None:
            return -p
        return -torch.exp(_truncated(log_ratio.detach(), config.max_importance_ratio)) * p
    if config.loss == "gspo":
        num_tokens_B1 = counts.sum(dim=1, keepdim=True).clamp(min=1)
        mean_B1 = _row_sums(log_ratio.detach())[:, None] / num_tokens_B1
        log_ratio = mean_B1 + (p - p.detach())
    if config.max_importance_ratio is not None:
        log_ratio = _truncated(log_ratio, config.max_importance_ratio)
    # Without an advantage the ratio counts for nothing, also where it overflows.
    log_ratio = torch.where(A == 0, 0.0, log_ratio)
    if config.loss == "importance_sampling":
        return -torch.exp(log_ratio) * A
    low, high = clip_range(config)
    clipped = _is_clipped(config, torch.exp(log_ratio.detach()), A)
    # Not torch.minimum: its gradient is NaN where the ratio that it leaves out overflows.
    ratio = torch.exp(torch.where(clipped, 0.0, log_ratio))
    bound = torch.where(A > 0, torch.full_like(A, high), low)
    return -torch.where(clipped, bound, ratio) * A


def _stable_reinforce(config: LossConfig, p: Tensor, q: Tensor, A: Tensor) -> Tensor:
    """As `_terms`, of what is not guarded: our own, docs/losses.md argues it."""
    log_ratio = _truncated(p - q, max_ratio(config))
    terms = -torch.exp(log_ratio.detach()) * p * A
    if config.sampler_kl_coefficient:
        terms = terms + config.sampler_kl_coefficient * (torch.expm1(log_ratio) - log_ratio)
    return terms


def _truncated(log_ratio: Tensor, max_ratio: float) -> Tensor:
    """The log of min(r, C), with the gradient of the log of r.

    E[min(r, C)·A·∇p] over the sampler's tokens is the truncated importance sampling of Yao et al.,
    "Your efficient RL framework secretly brings you off-policy RL training" (2025), where the
    policy that samples differs from the one that is trained, whether by numerics or by age.
    """
    most = math.log(max_ratio)
    return torch.where(log_ratio > most, most + (log_ratio - log_ratio.detach()), log_ratio)


def max_ratio(config: LossConfig) -> float:
    """C of the truncated importance correction; infinite: there is none."""
    if config.max_importance_ratio is not None:
        return config.max_importance_ratio
    return DEFAULT_MAX_RATIO if config.loss == "stable_reinforce" else math.inf


def _is_clipped(config: LossConfig, ratio: Any, A: Any) -> Any:
    """Where clipping acts, of tensors or arrays: in cispo on a factor, else on the whole term."""
    low, high = clip_range(config)
    if config.loss == "cispo":
        return (ratio < low) | (ratio > high)
    return ((A > 0) & (ratio > high)) | ((A < 0) & (ratio < low))


def _row_sums(values_BT: Tensor) -> Tensor:
    """Sums over T [B], from left to right, so that padding with 0 does not change a bit."""
    return values_BT.cumsum(dim=1)[:, -1]


def tempered(logits: Tensor, temperature: float | None) -> Tensor:
    """float32, of the distribution at `temperature`; without one nothing is divided."""
    return logits.float() if temperature is None else logits.float() / temperature


@torch.no_grad()
def entropies(logits_BTV: Tensor, temperature: float | None = None) -> Tensor:
    """Entropy of the policy at `temperature` at each position, nats, float32 [B, T].

    Needs no more memory than a few tens of MB besides the logits, in blocks of whole rows.
    """
    rows = logits_BTV.flatten(0, 1)
    found = torch.empty(len(rows), device=rows.device)
    size = max(_MAX_BLOCK_VALUES // rows.shape[1], 1)
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        # A row by itself is done twice: torch would sum it in another order than among others.
        twice = block.expand(max(len(block), 2), -1)
        probabilities = tempered(twice, temperature).softmax(dim=1)
        sums = torch.special.entr(probabilities).sum(dim=1)
        found[start : start + size] = sums[: len(block)]
    return found.view(logits_BTV.shape[:2])


def metrics(
    config: LossConfig,
    data: Sequence[Datum],
    *,
    losses: Sequence[float],
    logprobs: Sequence[FloatArray],
    base_logprobs: Sequence[FloatArray] | None,
    entropies: Sequence[FloatArray] | None = None,
) -> dict[str, float]:
    """The metrics of TrainingService.ForwardBackward; means over positions of weight ≠ 0, or 0.

    base_logprobs and entropies: per datum [T], where `config` asks for them.
    """
    counts = [_counted(datum) for datum in data]

    def counted(arrays: Sequence[FloatArray]) -> NDArray[np.float64]:
        values: NDArray[np.float64] = np.concatenate(arrays)[np.concatenate(counts)].astype(float)
        return values

    p = counted(logprobs)
    found = {"loss": float(np.sum(losses, dtype=np.float64)), "num_tokens": float(len(p))}
    q = [datum.sampling_logprobs for datum in data if datum.sampling_logprobs is not None]
    with np.errstate(over="ignore"):  # A ratio beyond float64 is reported as infinite.
        if q:
            log_ratios = p - counted(q)
            found |= _ratio_metrics(log_ratios)
            # What clipping and truncation see: the loss's own ratio.
            if config.loss == "gspo":
                log_ratios = _means_of_data(log_ratios, counts)
            ratios = np.exp(log_ratios)
            if config.loss in CLIP_RANGES:
                A = counted([datum.advantages for datum in data if datum.advantages is not None])
                found["clip_fraction"] = _mean(_is_clipped(config, ratios, A))
            if max_ratio(config) < math.inf:
                found["truncated_fraction"] = _mean(ratios > max_ratio(config))
            if config.loss == "stable_reinforce":
                found["guarded_fraction"] = guarded_fraction(config, data, log_ratios, counts)
        if base_logprobs is not None:
            found["kl_base"] = _mean(_k3(counted(base_logprobs) - p))
    if entropies is not None:
        found["entropy"] = _mean(counted(entropies))
    return found


def _counted(datum: Datum) -> Flags:
    """The positions that count: those of weight ≠ 0, if there are sequence_ids of a sequence."""
    length = len(datum.token_ids)
    found: Flags = np.ones(length, bool) if datum.weights is None else datum.weights != 0
    return found if datum.sequence_ids is None else found & (datum.sequence_ids >= 0)


def _ratio_metrics(log_ratios: NDArray[np.float64]) -> dict[str, float]:
    """Of r = exp(p − q): ess is (Σr)² / (n·Σr²), Kish's effective sample size as a share of n."""
    ratios = np.exp(log_ratios)
    # A common factor cancels out: with the largest ratio as 1 neither sum can overflow.
    scaled = np.exp(log_ratios - log_ratios.max(initial=-np.inf))
    squares = len(scaled) * float((scaled**2).sum())
    return {
        "kl_sampler": _mean(_k3(log_ratios)),
        "ratio_mean": _mean(ratios),
        "ratio_max": float(ratios.max(initial=0.0)),
        "ess": float(scaled.sum()) ** 2 / squares if squares else 0.0,
    }


def _means_of_data(log_ratios: NDArray[np.float64], counts: Sequence[Flags]) -> NDArray[np.float64]:
    """At each counted position the mean over its datum's."""
    lengths = [int(count.sum()) for count in counts]
    ends = np.cumsum(lengths).tolist()
    means = [
        _mean(log_ratios[end - length : end]) for end, length in zip(ends, lengths, strict=True)
    ]
    spread: NDArray[np.float64] = np.repeat(means, lengths)
    return spread


def _mean(values: NDArray[np.float64] | Flags) -> float:
    return float(values.sum()) / max(len(values), 1)


def _k3(difference: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(d) − d − 1, the estimator of KL."""
    estimate: NDArray[np.float64] = np.expm1(difference) - difference
    return estimate
