"""One pass: units of any adapters, of one length, through the model together, and back.

Losses, and the softmax that they come from, are computed unit by unit, in a shape that no other
unit changes; what is shared is computed as linear.py says. One pass backward serves all units:
their losses are never added up, so that one that is NaN stays its owner's.
Legend: P sequences of the pass, B of a unit, T positions, V vocabulary.
"""

# ruff: noqa: N803, N806, N815 - shape suffixes

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from services.trainer import losses
from services.trainer.lora import Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from rollmesh.types import FloatArray, LossConfig
    from services.trainer.batches import Chunk
    from services.trainer.linear import Factors
    from services.trainer.lora import LoraWeights

    Logits = Callable[[Tensor, Sequence[Rows]], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A unit in a pass; `config` None: only its log-probabilities are wanted, no loss.

    `temperature` is that of the distribution, None for 1; with a config it is the config's.
    `backward`: its gradients are wanted, for which it has a config. All parts of a pass have one
    length and either all of them go backward or none.
    """

    chunk: Chunk
    weights: LoraWeights
    config: LossConfig | None
    temperature: float | None = None
    backward: bool = True
    gradients: dict[str, Factors] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a part gives, as far as its config asks for it.

    gradient is flat, in the order of LoraWeights.parameters().
    """

    logprobs_BT: FloatArray
    base_logprobs_BT: FloatArray | None = None
    losses_B: NDArray[np.float64] | None = None
    entropies_BT: FloatArray | None = None
    gradient: Tensor | None = None


def run_pass(logits: Logits, parts: Sequence[Part], device: torch.device) -> list[Outcome]:
    """The outcome of each part.

    `logits` gives those [P, T, V] of token ids [P, T], with the adapters of the rows it is told.
    """
    penalized = [part for part in parts if part.config and part.config.kl_coefficient is not None]
    base = dict(zip(penalized, _base_logprobs(logits, penalized, device), strict=True))
    backward = parts[0].backward
    with torch.set_grad_enabled(backward):
        logits_PTV = logits(_token_ids(parts, device), _rows(parts))
    sizes = [len(part.chunk.indices) for part in parts]
    split_logits = _split(logits_PTV.detach(), sizes)
    if not backward:
        return [
            _losses(part, logits_BTV, base.get(part))
            for part, logits_BTV in zip(parts, split_logits, strict=True)
        ]
    gradient_PTV = torch.empty_like(logits_PTV)
    found_losses = [
        _losses(part, logits_BTV, base.get(part), gradient_BTV)
        for part, logits_BTV, gradient_BTV in zip(
            parts, split_logits, _split(gradient_PTV, sizes), strict=True
        )
    ]
    torch.autograd.backward(logits_PTV, gradient_PTV)
    return [
        replace(outcome, gradient=_flat(part))
        for part, outcome in zip(parts, found_losses, strict=True)
    ]


@torch.no_grad()
def _base_logprobs(logits: Logits, parts: Sequence[Part], device: torch.device) -> list[Tensor]:
    """Log-probability of each target [B, T] of each part under the base model."""
    if not parts:
        return []
    logits_PTV = logits(_token_ids(parts, device), ())
    sizes = [len(part.chunk.indices) for part in parts]
    return [
        _targets_of(_log_softmax(logits_BTV, part.temperature), part)
        for part, logits_BTV in zip(parts, _split(logits_PTV, sizes), strict=True)
    ]


def _losses(
    part: Part, logits_BTV: Tensor, base_BT: Tensor | None, gradient_BTV: Tensor | None = None
) -> Outcome:
    """All but the gradient of the factors; that of the logits goes to `gradient_BTV`."""
    chunk, config, device = part.chunk, part.config, logits_BTV.device
    temperature = part.temperature
    logprobs_BTV = _log_softmax(logits_BTV, temperature)
    if config is None:
        return Outcome(_targets_of(logprobs_BTV, part).cpu().numpy())
    with torch.enable_grad():
        logprobs_BT = _targets_of(logprobs_BTV, part).requires_grad_()
        losses_B = losses.losses(
            config,
            logprobs_BT,
            weights_BT=torch.from_numpy(chunk.weights_BT).to(device),
            sampling_logprobs_BT=torch.from_numpy(chunk.sampling_logprobs_BT).to(device),
            advantages_BT=torch.from_numpy(chunk.advantages_BT).to(device),
            base_logprobs_BT=base_BT,
            sequence_ids_BT=chunk.sequence_ids_BT,
        )
    if gradient_BTV is not None:
        (gradient_BT,) = torch.autograd.grad(losses_B.sum(), logprobs_BT)
        if temperature is not None:
            gradient_BT = gradient_BT / temperature
        # d log p(target) / d logits = ([is the target] - p) / temperature
        logprobs_BTV.exp_().mul_(gradient_BT.neg().unsqueeze(-1))
        logprobs_BTV.scatter_add_(-1, _targets(part, device), gradient_BT.unsqueeze(-1))
        gradient_BTV.copy_(logprobs_BTV)
    entropies_BT = losses.entropies(logits_BTV, temperature) if config.entropy else None
    return Outcome(
        logprobs_BT.detach().cpu().numpy(),
        base_logprobs_BT=None if base_BT is None else base_BT.cpu().numpy(),
        losses_B=losses_B.detach().cpu().numpy(),
        entropies_BT=None if entropies_BT is None else entropies_BT.cpu().numpy(),
    )


def _log_softmax(logits_BTV: Tensor, temperature: float | None) -> Tensor:
    return torch.log_softmax(losses.tempered(logits_BTV, temperature), dim=-1)


def _targets_of(values_BTV: Tensor, part: Part) -> Tensor:
    return values_BTV.gather(-1, _targets(part, values_BTV.device)).squeeze(-1)


def _targets(part: Part, device: torch.device) -> Tensor:
    return torch.from_numpy(part.chunk.target_token_ids_BT).to(device).long().unsqueeze(-1)


def _split(values: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    found: Sequence[Tensor] = values[: sum(sizes)].split(sizes)  # type: ignore[no-untyped-call]
    return found


def _token_ids(parts: Sequence[Part], device: torch.device) -> Tensor:
    """The parts' tokens, one part after the other, and then perhaps a sequence of nobody's."""
    rows = [torch.from_numpy(part.chunk.token_ids_BT) for part in parts]
    if device.type == "cpu" and sum(map(len, rows)) == 1:
        # For a single sequence torch takes other ways in places, with other roundings.
        rows.append(torch.zeros_like(rows[0]))
    return torch.cat(rows).to(device)


def _rows(parts: Sequence[Part]) -> list[Rows]:
    """Where each part stands in the pass."""
    rows = []
    start = 0
    for part in parts:
        stop = start + part.chunk.token_ids_BT.size
        rows.append(Rows(start, stop, part.weights, part.gradients))
        start = stop
    return rows


def _flat(part: Part) -> Tensor:
    """The part's gradients in one tensor; a pass may not reach every layer."""
    found = part.gradients
    return torch.cat(
        [
            gradient.flatten()
            for name, factors in part.weights.factors.items()
            for gradient in found.get(name, [torch.zeros_like(factor) for factor in factors])
        ]
    )
