"""Configuration of the sampler."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

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
    """Requests that may wait for a slot or for key-value memory, at most half of them of one
    project; one more is refused with OVERLOADED. As many others may wait for a version to come."""
    kv_overcommit: Annotated[float, Field(ge=1)] = 2.0
    """Requests are admitted until what they may come to need is so many times the key-value memory:
    most completions end before max_tokens, and the engine computes again what it had to put off."""
    max_num_seqs: PositiveInt = 256
    """Completions computed together. A request begins only while fewer run."""
    chunk_tokens: PositiveInt = 16
    """Tokens of a completion that are gathered before they are sent."""
    max_versions: PositiveInt = 256
    """Adapter versions kept in cache_dir. The least recently used is dropped, and pulled again when
    it is asked for."""
    max_cache: Bytes = 2 * 2**30
    """Bytes of adapters kept in cache_dir, as max_versions; text like "512MiB" works too."""
    max_rank: Annotated[int, Field(ge=1, le=512)] = 64
    """Largest LoRA rank. The engine reserves memory for it in every slot."""
    max_loras: PositiveInt = 8
    """Slots: versions computed together in one batch. More take turns."""
    quantum_s: PositiveFloat = 1.0
    """How long a version may keep its slot while others wait for one; longer where a change costs
    more than an eighth of that. Then its running completions end, no new one begins, and the slot
    goes to who waits longest."""
    blobs: str = ""
    """Folder, or URL that fsspec understands, of the mesh's blob store: versions are pulled from
    there while their trainer is away. Empty: they have to wait for it."""
    cache_dir: Path | None = None
    """Folder for the pulled adapters, best in memory. Absent: /dev/shm where max_cache fits, else
    the temporary folder. The sampler makes a folder of its own there and removes it at the end."""
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
    """Seconds that requests under way get to finish when the service is told to end. Meanwhile it
    is NOT_SERVING and says in GetSampler that it drains, and the coordinator asks others."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Traces, metrics and logs."""
