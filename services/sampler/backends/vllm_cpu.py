"""What vLLM's worker needs on a CPU: permission to use AMX, and LoRA for mixed batches.

Chosen with vLLM's own `worker_cls`, so it needs no plugin to be installed and is never missing.

AMX: in bfloat16, vLLM's attention uses the AMX tiles of newer x86 processors without asking the
kernel for them, and dies of SIGILL unless another library happened to ask before: every third
start died. `torch.cpu._init_amx` asks.

LoRA: vLLM's CPU kernels take the slot of each token, −1 for the base model, as an index, and −1 is
the last slot: a token of the base model beside tokens of adapters gets the adapter that happens to
be there. They also copy both factors once per token. Here each slot of the batch is one
multiplication of its own rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class CpuWorker(CPUWorker):  # type: ignore[misc]  # vLLM is untyped to mypy
    """vLLM's CPU worker, with AMX allowed and the LoRA kernels below."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        if hasattr(torch.cpu, "_init_amx"):
            torch.cpu._init_amx()  # noqa: SLF001 - torch has no public name for it
        name = f"{SlotwiseLora.__module__}.{SlotwiseLora.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda _: name)
        super().__init__(vllm_config, *args, **kwargs)


class SlotwiseLora(PunicaWrapperCPU):  # type: ignore[misc]
    """LoRA of a batch whose tokens use different slots or none.

    T tokens; slots are adapters; lora_a: [slots, 1, rank, in], lora_b: [slots, 1, out, rank].
    """

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Take in which slot each token of the next batch uses."""
        super().update_metadata(*args, **kwargs)
        self._rows = _rows_of_slots(self.token_lora_indices)

    def _shrink_prefill(
        self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float
    ) -> None:
        """Set y to scale × x·Aᵀ; the rows of tokens without an adapter stay as they are, zero."""
        for slot, rows in self._rows:
            y[rows] = (x[rows] @ w_t_all[slot, 0].T).to(y.dtype) * scale

    def _expand_slice_prefill(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        w_t_all: torch.Tensor,
        y_offset: int,
        y_slice_size: int,
        add_inputs: bool,  # noqa: FBT001 - vLLM's signature
    ) -> None:
        """Add x·Bᵀ to the columns of y from y_offset on, or put it there."""
        columns = slice(y_offset, y_offset + y_slice_size)
        for slot, rows in self._rows:
            update = x[rows].to(y.dtype) @ w_t_all[slot, 0].T
            y[rows, columns] = y[rows, columns] + update if add_inputs else update

    def add_lora_embedding(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: VllmBackend refuses adapters of the embedding."""

    def add_lora_logits(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: VllmBackend refuses adapters of the unembedding."""


def _rows_of_slots(slots: torch.Tensor) -> list[tuple[int, slice | torch.Tensor]]:
    """Each slot of `slots` [T] with its rows; −1 is no slot."""
    found = sorted(set(slots.tolist()))
    if len(found) == 1:
        # By far the most frequent batch; a slice copies nothing.
        return [(slot, slice(None)) for slot in found if slot >= 0]
    return [(slot, (slots == slot).nonzero().squeeze(1)) for slot in found if slot >= 0]
