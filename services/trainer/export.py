"""A published version of an adapter: the two files of a PEFT folder, in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import save

from rollmesh.digest import safetensors_digest
from rollmesh.errors import InvalidRequest
from rollmesh.types import AdapterExport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rollmesh.types import LoraConfig, TrainerAdapter
    from services.trainer.lora import LoraWeights


@dataclass(frozen=True, slots=True, eq=False)
class AdapterVersion:
    """What ExportAdapter streams: header, the bytes of adapter_model.safetensors, their digest.

    `export_key`: where the same is in the blob store, or will be. Empty: nowhere.
    """

    header: AdapterExport
    file: bytes
    digest: str
    export_key: str = ""

    def chunks(self, size: int, *, offset: int = 0) -> Iterator[bytes]:
        """The file from `offset` on, in pieces of at most `size` bytes.

        Raises:
            InvalidRequest: it has no such offset.
        """
        if not 0 <= offset <= len(self.file):
            raise InvalidRequest(
                f"offset: {offset}, the file has {len(self.file)} bytes",
                field="offset",
                value=offset,
                allowed=f"0 to {len(self.file)}",
            )
        return (self.file[start : start + size] for start in range(offset, len(self.file), size))


def make_version(adapter: TrainerAdapter, weights: LoraWeights, base_model: str) -> AdapterVersion:
    """A copy of `weights` as `adapter`'s current version, in PEFT's names and format, float32."""
    file = peft_file(weights)
    header = AdapterExport(
        adapter=adapter.name,
        policy_version=adapter.policy_version,
        base_model=base_model,
        adapter_config_json=peft_config(adapter.lora, base_model),
        num_bytes=len(file),
    )
    return AdapterVersion(header, file, safetensors_digest(file))


def parameter_names(weights: LoraWeights) -> list[str]:
    """What PEFT calls them, in the order of LoraWeights.parameters."""
    return [
        f"base_model.model.{layer}.lora_{factor}.weight"
        for layer in weights.factors
        for factor in "AB"
    ]


def peft_file(weights: LoraWeights) -> bytes:
    """The contents of adapter_model.safetensors."""
    parameters = (parameter.detach().cpu() for parameter in weights.parameters())
    tensors = dict(zip(parameter_names(weights), parameters, strict=True))
    file: bytes = save(tensors, metadata={"format": "pt"})
    return file


def peft_config(lora: LoraConfig, base_model: str) -> str:
    """The contents of adapter_config.json."""
    config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(lora.target_modules),
    )
    # PEFT keeps sets, which JSON does not know; sorted, so that a version has one text.
    return json.dumps(config.to_dict(), default=sorted, indent=2, sort_keys=True)
