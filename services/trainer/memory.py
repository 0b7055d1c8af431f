"""How much memory an adapter takes, known before it is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh.types import LoraConfig
from services.trainer.state import fresh_weights

if TYPE_CHECKING:
    from services.trainer.lora import LoraLayers

_FLOAT32_BYTES = 4
# Weights, two moments, the pending gradients.
_COPIES = 4


class AdapterSizes:
    """Bytes of adapters on `layers`, of which `kept_versions` published versions are kept."""

    def __init__(self, layers: LoraLayers, *, kept_versions: int) -> None:
        self._bytes_per_parameter = _FLOAT32_BYTES * (_COPIES + kept_versions)
        # A factor has as many rows or columns as the rank, so parameters grow in step with it.
        self._parameters_per_rank = {
            target: sum(
                parameter.numel()
                for parameter in fresh_weights(
                    layers, LoraConfig(1, 1.0, target_modules=(target,))
                ).parameters()
            )
            for target in (*layers.target_modules, layers.unembedding)
            if target is not None
        }

    def of(self, lora: LoraConfig) -> int:
        """Bytes of an adapter, all its versions and pending gradients included."""
        per_rank = sum(self._parameters_per_rank[target] for target in lora.target_modules)
        return lora.rank * per_rank * self._bytes_per_parameter
