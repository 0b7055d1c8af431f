"""Configuration of the reward service."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt

from rollmesh.config import Address, Config
from rollmesh.telemetry import TelemetryConfig


class RewardConfig(Config):
    """The reward service: scores completions with named functions."""

    listen: Address = "127.0.0.1:7430"
    """Address to serve at, host:port. Port 0: a free one."""
    drain_s: NonNegativeFloat = 10.0
    """Seconds that calls under way get to finish when the service is told to end."""
    num_workers: PositiveInt = 2
    """Processes for functions whose time may explode (regex_match, math_match)."""
    item_timeout_s: Annotated[float, Field(gt=0, le=60)] = 2.0
    """Processor time in seconds that one item may take in such a process."""
    max_batches: PositiveInt = 1024
    """Batches scored or waiting at once; one more is refused with OVERLOADED."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Traces, metrics and logs."""
