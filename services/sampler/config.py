"""Configuration of the sampler."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt, model_validator

from rollmesh.config import Address, BaseModelConfig, Config
from rollmesh.telemetry import TelemetryConfig

_UNITS = {"": 1, "MiB": 2**20, "GiB": 2**30}


def _bytes(value: object) -> object:
    """`value`, or the number of bytes that text like "512MiB" or "1.5 GiB" means."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(|MiB|GiB)", value)
    if match is None:
        raise ValueError(f"{value!r} is not a size: give bytes, or text like '512MiB' or '1.5GiB'")
    return int(float(match[1]) * _UNITS[match[2]])


Bytes = Annotated[PositiveInt, BeforeValidator(_bytes, json_schema_input_type=int | str)]


class SamplerConfig(Config):
    """The sampler: one base model in an inference engine, adapters hot-swapped by version."""

    listen: Address = "127.0.0.1:7420"
    """Address to serve at, host:port. Port 0: a free one."""
    base_model: BaseModelConfig
    """The model to load."""
    backend: Literal["auto", "vllm", "transformers"] = "auto"
    """Inference engine. auto: vLLM where it imports, else transformers, which is slow."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations. auto: as the model was saved."""
    max_length: PositiveInt | None = None
    """Longest prompt plus completion, in tokens. Absent: the model's own."""
    max_queued: PositiveInt = 1024
    """Requests admitted at once; one more is refused with OVERLOADED."""
    max_num_seqs: PositiveInt = 256
    """Completions computed together; the others of the admitted requests wait."""
    chunk_tokens: PositiveInt = 16
    """Tokens of a completion that are gathered before they are sent."""
    max_versions: PositiveInt = 64
    """Adapter versions known at once. The least recently used is dropped, and pulled again when
    it is asked for."""
    max_rank: Annotated[int, Field(ge=1, le=512)] = 64
    """Largest LoRA rank. The engine reserves memory for it in every slot."""
    max_loras: PositiveInt = 8
    """Slots: versions computed together in one batch. More take turns. vLLM only."""
    max_cpu_loras: PositiveInt = 64
    """Versions that vLLM keeps in main memory, at least max_loras; others it reads again from
    cache_dir."""
    cache_dir: Path | None = None
    """Folder for the pulled adapters, best in memory. Absent: /dev/shm, else the temporary folder.
    The sampler makes a folder of its own there and removes it at the end."""
    kv_cache_memory: Bytes | None = None
    """Memory for the KV cache: bytes, or text like "512MiB", "4GiB". Absent: 1 GiB on a CPU, what
    vLLM finds free on a GPU. vLLM only."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs that share the model. vLLM only."""
    enforce_eager: bool = False
    """Skip CUDA graphs: a faster start, slower sampling. vLLM only."""
    num_threads: PositiveInt | None = None
    """CPU threads for the model, bound to no core. Absent: vLLM binds one thread to each physical
    core but one, which is best when the machine is its own."""
    drain_s: NonNegativeFloat = 30.0
    """Seconds that requests under way get to finish when the service is told to end."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Traces, metrics and logs."""

    @model_validator(mode="after")
    def _slots_fit_into_the_cache(self) -> SamplerConfig:
        if self.max_cpu_loras < self.max_loras:
            raise ValueError(
                f"max_cpu_loras: {self.max_cpu_loras} is less than max_loras, {self.max_loras}"
            )
        return self
