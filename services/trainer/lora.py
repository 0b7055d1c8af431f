"""LoRA on a frozen model: adapters of any rank and target set, side by side in one pass.

The model is never rebuilt for an adapter: its linear layers are told before each pass which rows
belong to whose factors. Legend: I inputs and O outputs of a layer, R rank.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.activations import ACT2CLS

from services.trainer.linear import Factors, Segment, SharedLinear, whole_vectors

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch import Tensor

# Elementwise functions; some stand beside their settings.
_ACTIVATIONS = tuple(
    entry[0] if isinstance(entry, tuple) else entry for entry in dict(ACT2CLS).values()
)


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
        # Copied: torch aligns what it allocates, as a buffer that was read need not be, and a
        # matrix product may have other bits where its factors begin elsewhere in a cache line.
        leaves = iter([parameter.detach().clone() for parameter in parameters])
        factors = {name: Factors(next(leaves), next(leaves)) for name in self.factors}
        return LoraWeights(self.scale, factors)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows `start` to `stop` of a pass, whose adapter is `weights`.

    A pass backward leaves the gradients of its factors in `gradients`, by layer.
    """

    start: int
    stop: int
    weights: LoraWeights
    gradients: dict[str, Factors]


class LoraLayers:
    """The linear layers of a model, which LoRA can adapt.

    Attributes:
        target_modules: last parts of the layers' names, each once, in the order of the model; all
            but the unembedding.
        unembedding: last part of the unembedding's name, a target only for who asks for it; None
            where it is no linear layer.
    """

    def __init__(self, model: nn.Module, unembedding: nn.Module | None) -> None:
        self._layers: dict[str, SharedLinear] = {}
        self.unembedding: str | None = None
        names = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                self._layers[name] = layer = SharedLinear(name, module)
                module.forward = layer  # type: ignore[assignment]
                if module is unembedding:
                    self.unembedding = _last_part(name)
                else:
                    names.append(_last_part(name))
            elif isinstance(module, _ACTIVATIONS):
                module.forward = whole_vectors(module.forward)
        self.target_modules = tuple(dict.fromkeys(names))

    def fresh(
        self, *, rank: int, alpha: float, target_modules: Collection[str], seed: int
    ) -> LoraWeights:
        """A drawn as peft draws it, from a generator of its own; B zero, so nothing is changed."""
        # Drawn on the CPU: a seed means the same weights on every device.
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for name, layer in self._layers.items():
            if _last_part(name) in target_modules:
                num_outputs, num_inputs = layer.weight_OI.shape
                a = torch.empty(rank, num_inputs)
                nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
                device = layer.weight_OI.device
                b = torch.zeros(num_outputs, rank, device=device)
                factors[name] = Factors(a.to(device), b)
        return LoraWeights(alpha / rank, factors)

    @contextlib.contextmanager
    def active(self, parts: Sequence[Rows]) -> Iterator[None]:
        """A pass inside applies each part's adapter to its rows; the others are the base's."""
        used: dict[str, list[Segment]] = {}
        for part in parts:
            for name, factors in part.weights.factors.items():
                segment = Segment(
                    part.start, part.stop, part.weights.scale, factors, part.gradients
                )
                used.setdefault(name, []).append(segment)
        for name, segments in used.items():
            self._layers[name].segments = segments
            self._layers[name].num_rows = parts[-1].stop
        try:
            yield
        finally:
            for name in used:
                self._layers[name].segments = []


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
