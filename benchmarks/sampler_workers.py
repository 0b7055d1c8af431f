"""vLLM's CPU worker with nothing of the sampler's in it, with either kind of LoRA kernels."""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker

from services.sampler.backends.vllm_lora import SlotwiseLora


class StockWorker(CPUWorker):  # type: ignore[misc]  # vLLM is untyped to mypy
    """vLLM's own LoRA kernels. It may use AMX, or it would die of it on some processors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if hasattr(torch.cpu, "_init_amx"):
            torch.cpu._init_amx()  # noqa: SLF001 - torch has no public name for it
        super().__init__(*args, **kwargs)


class KernelsWorker(StockWorker):
    """The sampler's LoRA kernels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = f"{SlotwiseLora.__module__}.{SlotwiseLora.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda _: name)
        super().__init__(*args, **kwargs)
