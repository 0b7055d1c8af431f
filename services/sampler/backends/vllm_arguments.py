"""The arguments that vLLM is started with."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast, get_args

from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from services.sampler.backends.vllm_executor import InProcess, InProcesses
from services.sampler.backends.vllm_life import Whereabouts
from services.sampler.backends.vllm_requests import CONSTRAINTS

if TYPE_CHECKING:
    from pathlib import Path

    from services.sampler.config import SamplerConfig

CPU_WORKER = "services.sampler.backends.vllm_cpu.CpuWorker"
GPU_WORKER = "services.sampler.backends.vllm_gpu.GpuWorker"
_CPU_TOKENS = 512
"""Of a step. Log-probabilities of a prompt take several float32 [tokens, vocabulary] at once: with
150,000 tokens in the vocabulary, 0.3 GB each."""


def engine_args(config: SamplerConfig, folder: Path) -> AsyncEngineArgs:
    """Arguments of vLLM. On a CPU this sets the environment that its processes inherit, too."""
    on_cpu = current_platform.is_cpu()
    if on_cpu:
        # With LoRA, vLLM compiles nothing on a CPU but two tiny functions of its sampler, for
        # which the first batch waits up to half a minute, and which need a C++ compiler.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        if config.num_threads is not None:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            os.environ["OMP_NUM_THREADS"] = str(config.num_threads)
            # Cores that are shared: a thread that waits by spinning takes from those it waits for.
            # With two threads on two busy cores that made sampling 15 times slower.
            os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # Beside a full batch each adapter that runs nothing, and the base model, may begin one.
    max_num_seqs = config.max_num_seqs + config.max_loras + 1
    ranks = cast("tuple[int, ...]", get_args(MaxLoRARanks))
    return AsyncEngineArgs(
        model=config.base_model.source,
        dtype=config.dtype,
        max_model_len=config.max_length,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(_CPU_TOKENS, max_num_seqs) if on_cpu else None,
        enable_lora=True,
        max_loras=config.max_loras,
        max_cpu_loras=config.max_loras,
        max_lora_rank=next(rank for rank in ranks if rank >= config.max_rank),
        tensor_parallel_size=config.tensor_parallel_size,
        enforce_eager=config.enforce_eager,
        kv_cache_memory_bytes=config.kv_cache_memory or (2**30 if on_cpu else None),
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        structured_outputs_config={"backend": CONSTRAINTS},
        logprobs_mode="raw_logprobs",
        distributed_executor_backend=InProcess if config.tensor_parallel_size == 1 else InProcesses,
        worker_cls=CPU_WORKER if on_cpu else GPU_WORKER,
        additional_config=Whereabouts(str(folder)),
        disable_log_stats=True,
    )
