"""The documented losses, in torch: what forward_backward's numbers are compared with.

p: log-probability of a target; q: the sampler's of it; A: its advantage; r = exp(p - q).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Formula = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Loss:
    """`formula` of p, q, A and w of one datum: what is summed. `config`: loss_fn_config.

    `near`: q is taken near to p, each datum in its own way; else anywhere.
    """

    formula: Formula
    fields: tuple[str, ...] = ("logprobs", "advantages")
    config: dict[str, float] = field(default_factory=dict)
    near: bool = False

    def inputs(self, name: str, index: int, n: int, sampled: list[float]) -> list[float]:
        """A field of loss_fn_inputs of one datum."""
        values = {"logprobs": sampled, "advantages": _advantages(index, n), "weights": _weights(n)}
        return values[name]

    def value(self, logprobs: Sequence[torch.Tensor], sampled: list[list[float]]) -> torch.Tensor:
        """The loss of all data."""
        total = torch.zeros(())
        for index, p in enumerate(logprobs):
            total = total - self.formula(
                p,
                torch.tensor(sampled[index]),
                torch.tensor(_advantages(index, len(p))),
                torch.tensor(_weights(len(p))),
            )
        return total


def sampler_logprobs(index: int, pair: tuple[list[int], list[int]]) -> list[float]:
    """Some, so near the policy's that ratios lie on both sides of each bound."""
    generator = np.random.default_rng(index)
    return generator.uniform(-7.0, -0.5, len(pair[0])).astype(np.float32).tolist()


def near_logprobs(index: int, p: Sequence[float]) -> list[float]:
    """Near `p`: of the first datum with one ratio above 2; of the last, all are far."""
    offsets = [[0.1, -0.1, 1.0, 0.05, 0.0, 0.0, 0.0], [0.2, -0.3, 0.1, 0.0], [0.8] * 5][index]
    return [float(each) - offset for each, offset in zip(p, offsets, strict=True)]


def _advantages(index: int, n: int) -> list[float]:
    return [(-1.0) ** (index + position) * (0.5 + 0.1 * position) for position in range(n)]


def _weights(n: int) -> list[float]:
    return [0.25 + 0.5 * (position % 3) for position in range(n)]


def _ppo(low: float, high: float) -> Formula:
    def formula(p: torch.Tensor, q: torch.Tensor, a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ratio = (p - q).exp()
        return torch.minimum(ratio * a, ratio.clamp(low, high) * a).sum()

    return formula


def _cispo(low: float, high: float) -> Formula:
    return lambda p, q, a, w: ((p - q).exp().clamp(low, high).detach() * p * a).sum()


def _dro(beta: float) -> Formula:
    return lambda p, q, a, w: (p * a - 0.5 * beta * (p - q) ** 2).sum()


def _gspo(low: float, high: float) -> Formula:
    def formula(p: torch.Tensor, q: torch.Tensor, a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ratio = ((p - q).mean().detach() + p - p.detach()).exp()
        return torch.minimum(ratio * a, ratio.clamp(low, high) * a).sum()

    return formula


def _stable_reinforce(penalty: float) -> Formula:
    """The mesh's own: docs/losses.md."""

    def formula(p: torch.Tensor, q: torch.Tensor, a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if abs(float((p - q).detach().mean())) > math.log(1.5):
            return 0.0 * p.sum()
        truncated = (p - q).exp().clamp(max=2.0).detach()
        away = truncated - 1.0 - truncated.log() + (truncated - 1.0) * (p - p.detach())
        return (truncated * p * a - penalty * away).sum()

    return formula


_CLIP = {"clip_low_threshold": 0.7, "clip_high_threshold": 1.5}

LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(lambda p, q, a, w: (w * p).sum(), ("weights",)),
    "importance_sampling": Loss(lambda p, q, a, w: ((p - q).exp() * a).sum()),
    "ppo": Loss(_ppo(0.7, 1.5), config=_CLIP),
    "cispo": Loss(_cispo(0.7, 1.5), config=_CLIP),
    "dro": Loss(_dro(0.1), config={"beta": 0.1}),
    "gspo": Loss(_gspo(0.2, 1.5), config={"clip_low_threshold": 0.2, "clip_high_threshold": 1.5}),
    "stable_reinforce": Loss(_stable_reinforce(0.3), config={"kl_coeff": 0.3}, near=True),
}
