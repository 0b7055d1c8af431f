"""LoRA on a frozen model: in each pass every linear layer asks which adapter applies.

The model is never rebuilt for an adapter: its linear layers carry a hook that looks the factors up
under the layer's name, so any number of adapters of any rank and target set share one model.
Legend: I inputs and O outputs of a layer, R rank.
"""

# ruff: noqa: N815 - shape suffixes

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch import Tensor


class Factors(NamedTuple):
    """The update of one layer is scale × B·A; both are float32 leaves that take gradients."""

    a_RI: Tensor
    b_OR: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """An adapter's factors by their layer's dotted name; a step replaces, never changes them."""

    scale: float
    factors: Mapping[str, Factors]

    def parameters(self) -> list[Tensor]:
        """A and B of each layer, in the order of the layers."""
        return [factor for pair in self.factors.values() for factor in pair]

    def replaced(self, parameters: Sequence[Tensor]) -> LoraWeights:
        """The same layers with `parameters`, given in the order in which `parameters()` lists."""
        leaves = iter([parameter.detach().requires_grad_() for parameter in parameters])
        factors = {name: Factors(next(leaves), next(leaves)) for name in self.factors}
        return LoraWeights(self.scale, factors)


class LoraLayers:
    """The linear layers of a model that LoRA can adapt: all but the unembedding.

    Attributes:
        target_modules: last parts of the layers' names, each once, in the order of the model.
    """

    def __init__(self, model: nn.Module, unembedding: nn.Module | None) -> None:
        self._active: LoraWeights | None = None
        self._layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and layer is not unembedding
        }
        self.target_modules = tuple(dict.fromkeys(_last_part(name) for name in self._layers))
        for name, layer in self._layers.items():
            layer.register_forward_hook(partial(self._update, name))

    def fresh(
        self, *, rank: int, alpha: float, target_modules: Collection[str], seed: int
    ) -> LoraWeights:
        """A drawn as peft draws it, from a generator of its own; B zero, so nothing is changed."""
        # Drawn on the CPU: a seed means the same weights on every device.
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for name, layer in self._layers.items():
            if _last_part(name) in target_modules:
                a = torch.empty(rank, layer.in_features)
                nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
                device = layer.weight.device
                b = torch.zeros(layer.out_features, rank, device=device)
                factors[name] = Factors(a.to(device).requires_grad_(), b.requires_grad_())
        return LoraWeights(alpha / rank, factors)

    @contextlib.contextmanager
    def active(self, weights: LoraWeights | None) -> Iterator[None]:
        """Passes inside apply `weights`; with None, and outside, the model is the base model."""
        self._active = weights
        try:
            yield
        finally:
            self._active = None

    def _update(
        self, name: str, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        if self._active is None or (factors := self._active.factors.get(name)) is None:
            return output
        # The update is float32 whatever the base is, and the sum is rounded once.
        reduced = self._active.scale * linear(inputs[0].float(), factors.a_RI)
        return (output + linear(reduced, factors.b_OR)).to(output.dtype)


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
