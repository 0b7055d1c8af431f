"""Configuration of a mesh on one machine: the services' own configurations, without addresses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveFloat, model_validator

from rollmesh.config import Config
from services.coordinator.config import CoordinatorConfig
from services.reward.config import RewardConfig
from services.sampler.config import SamplerConfig
from services.trainer.config import TrainerConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ServiceConfig = CoordinatorConfig | TrainerConfig | SamplerConfig | RewardConfig

_NOBODY = "127.0.0.1:0"
_CHOSEN = {
    "coordinator": ("listen", "state_dir", "blobs", "trainers", "samplers", "reward"),
    "trainers": ("listen", "blobs"),
    "samplers": ("listen", "blobs"),
    "reward": ("listen",),
}


class LocalConfig(Config):
    """A mesh on one machine. It chooses all addresses itself when it starts."""

    coordinator: CoordinatorConfig
    """The coordinator; it knows all others. Absent: every default."""
    trainers: list[TrainerConfig] = Field(min_length=1)
    """The trainers, one process each."""
    samplers: list[SamplerConfig] = Field(min_length=1)
    """The samplers, one process each."""
    reward: RewardConfig = RewardConfig()
    """The reward service."""
    start_s: PositiveFloat = 600.0
    """Seconds in which all of them must come to serve."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_chosen(cls, values: Any) -> Any:
        """Also put something where the coordinator's own model needs addresses."""
        if not isinstance(values, dict):
            return values
        for section, keys in _CHOSEN.items():
            given = values.get(section)
            for part in given if isinstance(given, list) else [given]:
                for key in keys:
                    if isinstance(part, dict) and key in part:
                        raise ValueError(f"{section}: {key!r} is chosen when the mesh starts")
        coordinator = values.get("coordinator", {})
        if not isinstance(coordinator, dict):
            return values
        members = {"trainers": [_NOBODY], "samplers": [_NOBODY], "reward": _NOBODY}
        return {**values, "coordinator": {**coordinator, **members}}

    def members(self) -> dict[str, ServiceConfig]:
        """The services by name: coordinator, trainer-0, …, sampler-0, … and reward."""
        return {
            "coordinator": self.coordinator,
            **{f"trainer-{index}": trainer for index, trainer in enumerate(self.trainers)},
            **{f"sampler-{index}": sampler for index, sampler in enumerate(self.samplers)},
            "reward": self.reward,
        }


def complete(
    config: LocalConfig, addresses: Mapping[str, str], state_dir: Path
) -> dict[str, ServiceConfig]:
    """The services' configurations by name, with the address of each and what is in `state_dir`."""
    complete = {
        name: member.model_copy(update={"listen": addresses[name]})
        for name, member in config.members().items()
    }
    blobs = str(state_dir / "blobs")
    for name, member in complete.items():
        if name.startswith(("trainer-", "sampler-")):
            complete[name] = member.model_copy(update={"blobs": blobs})
    complete["coordinator"] = complete["coordinator"].model_copy(
        update={
            "state_dir": state_dir,
            "blobs": blobs,
            "trainers": [addresses[name] for name in complete if name.startswith("trainer-")],
            "samplers": [addresses[name] for name in complete if name.startswith("sampler-")],
            "reward": addresses["reward"],
        }
    )
    return complete
