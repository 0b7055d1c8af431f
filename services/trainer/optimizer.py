"""AdamW over one adapter: a function from weights, state and gradients to new ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.optim.adamw import adamw

from rollmesh.errors import NonFinite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from rollmesh.types import AdamConfig

_UNCHANGED = "the adapter and its pending gradients are as they were"


@dataclass(frozen=True, slots=True, eq=False)
class AdamState:
    """Moments of each parameter, float32, and the steps taken."""

    step: int
    first_moments: tuple[Tensor, ...]
    second_moments: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class AdamStep:
    """What a step leaves; grad_norm is the gradients' global norm before clipping."""

    parameters: tuple[Tensor, ...]
    state: AdamState
    grad_norm: float


def fresh_state(parameters: Sequence[Tensor]) -> AdamState:
    """The state before the first step."""
    return AdamState(
        step=0,
        first_moments=tuple(torch.zeros_like(parameter) for parameter in parameters),
        second_moments=tuple(torch.zeros_like(parameter) for parameter in parameters),
    )


@torch.no_grad()
def adam_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: AdamState,
    config: AdamConfig,
) -> AdamStep:
    """The step from these parameters and this state; all that is passed in stays as it is.

    That of torch.optim.AdamW (arXiv 1711.05101), with gradients scaled down to max_grad_norm before
    it: by max_grad_norm / norm, of all of them together.

    Raises:
        NonFinite: the gradients, or the parameters or moments after the step.
    """
    # In float64: the square of a finite float32 gradient may not be finite.
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    norm = float(torch.linalg.vector_norm(torch.stack(norms)))
    if not math.isfinite(norm):
        raise NonFinite(f"the gradient is not finite; {_UNCHANGED}")
    if config.max_grad_norm is not None and norm > config.max_grad_norm:
        gradients = [gradient * (config.max_grad_norm / norm) for gradient in gradients]
    updated = [parameter.detach().clone() for parameter in parameters]
    first = [moment.clone() for moment in state.first_moments]
    second = [moment.clone() for moment in state.second_moments]
    adamw(
        updated,
        list(gradients),
        first,
        second,
        [],
        [torch.tensor(float(state.step)) for _ in updated],
        amsgrad=False,
        beta1=config.beta1,
        beta2=config.beta2,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        eps=config.epsilon,
        maximize=False,
    )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (*updated, *first, *second)):
        raise NonFinite(f"a step with {config} leaves a state that is not finite; {_UNCHANGED}")
    moments = AdamState(state.step + 1, tuple(first), tuple(second))
    return AdamStep(tuple(updated), moments, norm)
