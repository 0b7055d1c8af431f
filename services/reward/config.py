"""Configuration of the reward service."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator

from rollmesh.config import Address, Config
from rollmesh.telemetry import TelemetryConfig
from services.reward.environments.config import EnvironmentConfig


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
    environments: list[EnvironmentConfig] = []
    """Environments that others serve, which calls of EnvironmentService are sent on to."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Traces, metrics and logs."""

    @field_validator("environments")
    @classmethod
    def _names_once(cls, environments: list[EnvironmentConfig]) -> list[EnvironmentConfig]:
        names = [each.name for each in environments]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"there are two of the name {', '.join(twice)}")
        return environments
