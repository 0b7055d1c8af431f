"""Configuration of the trainer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from rollmesh.config import Address, BaseModelConfig, Config
from rollmesh.telemetry import TelemetryConfig


class TrainerConfig(Config):
    """The trainer: one base model and LoRA adapters on it."""

    listen: Address = "127.0.0.1:7410"
    """Address to serve at, host:port. Port 0: a free one."""
    base_model: BaseModelConfig
    """What is trained."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model and its adapters live."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the frozen base model. Adapters and their optimizer state are always float32."""
    max_rank: PositiveInt = 64
    """Largest LoRA rank accepted. No larger than what the samplers can load."""
    max_adapters: PositiveInt = 64
    """Adapters held at once; one more is refused with CAPACITY_EXHAUSTED."""
    max_adapter_bytes: PositiveInt = 8 * 2**30
    """Bytes that the adapters may take, all their published versions and pending gradients counted
    from the start: 4 bytes × parameters × (4 + kept_versions) each, where an adapter has rank ×
    (inputs + outputs) parameters for each layer that it adapts. One adapter too many is refused
    with CAPACITY_EXHAUSTED. What a pass needs, the copies of two adapters whose snapshots are
    written or read, and at most 8 published versions that are not in the blob store yet, come on
    top."""
    kept_versions: Annotated[int, Field(ge=2)] = 8
    """Published versions kept of each adapter, in main memory, the newest ones. A job's
    max_staleness may be at most 2 less: what is sampled must not be forgotten."""
    max_batch_tokens: PositiveInt = 8192
    """Tokens of one pass, padding included: a larger batch is cut into several passes, a longer
    sequence is refused. A pass needs about 12 bytes × vocabulary for each token."""
    max_queued_ops: PositiveInt = 64
    """Ops that may wait for the one that runs, and as many of each adapter for that adapter's own;
    one more is refused with OVERLOADED."""
    num_threads: PositiveInt = 2
    """Threads of torch on the CPU. Bits of results depend on it: trainers that take adapters over
    from each other must have the same number, and the same kind of processor."""
    blobs: str = ".rollmesh/blobs"
    """Where snapshots and published versions go: a folder, or a URL that fsspec understands
    (s3://…, gs://…; its driver, such as s3fs, must be installed). The coordinator and all trainers
    must share it; samplers may."""
    drain_s: NonNegativeFloat = 20.0
    """Seconds to end in. When told to end, the trainer first says so in GetTrainer and serves on,
    for at most half of them, while the coordinator moves its adapters away; it stays SERVING. It
    goes on once it holds none, or nobody has called GetTrainer for 2 s. Then it is NOT_SERVING,
    takes no new calls, and ops under way get the other half to finish. What is published is written
    to the blob store meanwhile."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Traces, metrics and logs."""
