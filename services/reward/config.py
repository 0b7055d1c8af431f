"""Configuration of the reward service."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from rollmesh.config import Address, Config
from rollmesh.names import ID_PATTERN
from rollmesh.telemetry import TelemetryConfig
from services.reward.environments.config import EnvironmentConfig

MAX_SIZE = 1_000_000
"""Tasks of a split."""


class SandboxConfig(Config):
    """Where Python that a model wrote is run (code_tests); without one it is not run at all."""

    tool: Literal["auto", "bubblewrap", "nsjail", "none"] = "auto"
    """What makes the sandboxes. With `auto` the first of bubblewrap and nsjail that is there and
    passes its test at start; where none does, functions that need one are refused. One that is
    named must pass, or the service does not start."""
    max_runs: PositiveInt = 2
    """Completions that are run at once; more of them wait. The tests of each run beside it."""
    max_cpu_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    """Most seconds of processor time that a caller may ask for one program."""
    max_memory_mib: Annotated[int, Field(ge=32, le=65536)] = 1024
    """Most memory in MiB that a caller may ask for one program."""


class ReasoningGymConfig(Config):
    """An environment with tasks of one kind of reasoning-gym."""

    name: str = Field(pattern=rf"^{ID_PATTERN}$")
    """Name that jobs call it by."""
    tasks: str
    """The kind, e.g. chain_sum."""
    config: dict[str, Any] = {}
    """What the package configures the kind with, e.g. {max_terms: 3}."""
    num_train: Annotated[int, Field(ge=1, le=MAX_SIZE)] = 10_000
    """Tasks of the split train."""
    num_heldout: Annotated[int, Field(ge=1, le=MAX_SIZE)] = 1_000
    """Tasks of the split heldout, of other seeds."""


class RewardConfig(Config):
    """The reward service: scores completions with named functions."""

    listen: Address = "127.0.0.1:7430"
    """Address to serve at, host:port. Port 0: a free one."""
    drain_s: NonNegativeFloat = 10.0
    """Seconds that calls under way get to finish when the service is told to end."""
    num_workers: PositiveInt = 2
    """Processes for functions whose time may explode, such as regex_match and math_match."""
    item_timeout_s: Annotated[float, Field(gt=0, le=60)] = 2.0
    """Processor time in seconds that one item may take in such a process."""
    max_batches: PositiveInt = 1024
    """Batches scored or waiting at once, and as many more that ask a judge, which hold up no
    others; one more is refused with OVERLOADED."""
    environments: list[EnvironmentConfig] = []
    """Environments that others serve, which calls of EnvironmentService are sent on to."""
    reasoning_gym: list[ReasoningGymConfig] = []
    """Environments of single turns with tasks of reasoning-gym, served by this service itself."""
    sandbox: SandboxConfig = SandboxConfig()
    """Where Python that a model wrote is run."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Traces, metrics and logs."""

    @model_validator(mode="after")
    def _names_once(self) -> Self:
        names = [each.name for each in self.environments]
        names += [each.name for each in self.reasoning_gym]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"environments: there are two of the name {', '.join(twice)}")
        return self
