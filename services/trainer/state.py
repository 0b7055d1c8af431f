"""What an adapter is between two ops: one immutable value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from services.trainer.optimizer import AdamState, fresh_state

if TYPE_CHECKING:
    from torch import Tensor

    from rollmesh.types import LoraConfig
    from services.trainer.lora import LoraLayers, LoraWeights


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Weights, optimizer and counters. `pending`: gradients in the order of the parameters.

    An op makes a new one; no tensor of it is ever changed, so that whoever holds one has all of it.
    """

    weights: LoraWeights
    adam: AdamState
    pending: tuple[Tensor, ...] | None = None
    policy_version: int = 0
    next_sequence: int = 1


def fresh_weights(layers: LoraLayers, lora: LoraConfig) -> LoraWeights:
    """Those that `lora`, whose defaults are filled in, begins with."""
    return layers.fresh(
        rank=lora.rank,
        alpha=cast("float", lora.alpha),
        target_modules=lora.target_modules,
        seed=lora.seed,
    )


def begin(weights: LoraWeights, adam: AdamState | None = None) -> State:
    """The state of an adapter that begins with `weights`; without `adam`, with a new optimizer."""
    return State(weights, fresh_state(weights.parameters()) if adam is None else adam)
