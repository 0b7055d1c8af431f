"""vLLM's GPU worker with verified slots, checked steps and own draws."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from services.sampler.backends.vllm_worker import VerifiedWorker


class GpuWorker(VerifiedWorker, Worker):  # type: ignore[misc]  # vLLM is untyped to mypy
    """vLLM's GPU worker, as the sampler uses it."""
