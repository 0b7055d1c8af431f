"""What vLLM's worker needs on a CPU: permission to use AMX, and LoRA for mixed batches.

AMX: in bfloat16, vLLM's attention uses the AMX tiles of newer x86 processors without asking the
kernel for them, and dies of SIGILL unless another library happened to ask before: every third
start died. `torch.cpu._init_amx` asks.

LoRA: the kernels of `vllm_lora`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker

from services.sampler.backends.vllm_lora import SlotwiseLora
from services.sampler.backends.vllm_worker import VerifiedWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class CpuWorker(VerifiedWorker, CPUWorker):  # type: ignore[misc]  # vLLM is untyped to mypy
    """vLLM's CPU worker as the sampler uses it, with AMX allowed and LoRA of mixed batches."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        if hasattr(torch.cpu, "_init_amx"):
            torch.cpu._init_amx()  # noqa: SLF001 - torch has no public name for it
        name = f"{SlotwiseLora.__module__}.{SlotwiseLora.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda _: name)
        super().__init__(vllm_config, *args, **kwargs)
