"""Configuration of a mesh on one machine: the services' own configurations, without addresses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, PositiveFloat, model_validator

from rollmesh.config import Config, PeerAddress
from services.coordinator.config import CoordinatorConfig
from services.gateway.config import GatewayConfig, ServedModel
from services.reward.config import RewardConfig
from services.reward.environments.config import EnvironmentConfig
from services.sampler.config import SamplerConfig
from services.trainer.config import TrainerConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

ServiceConfig = CoordinatorConfig | TrainerConfig | SamplerConfig | RewardConfig | GatewayConfig

_NOBODY = "127.0.0.1:0"
_REACHED_AT = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - what others listen at
_CHOSEN = {
    "coordinator": ("listen", "state_dir", "blobs", "trainers", "samplers", "reward"),
    "trainers": ("listen", "blobs"),
    "samplers": ("listen", "blobs"),
    "reward": ("listen",),
    "gateway": ("coordinator",),
    "environments": ("addresses", "tls"),
}


class LocalEnvironment(EnvironmentConfig):
    """An environment that the mesh starts itself, and that the reward service routes to."""

    command: list[str] = Field(min_length=1)
    """The program and its arguments, to which `--listen HOST:PORT` is added; `python` is the one
    that runs the mesh. It is started again when it ends, and told to end by SIGTERM."""
    addresses: list[PeerAddress] = [_NOBODY]
    """Chosen when the mesh starts."""


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
    gateway: GatewayConfig | None = None
    """The gateway, at a free port unless `listen` names one. Absent: there is none."""
    environments: list[LocalEnvironment] = []
    """Environments that are started with the mesh, one process each. Those that run elsewhere are
    in reward.environments."""
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
        values = {**values, "coordinator": {**coordinator, **members}}
        gateway = values.get("gateway")
        if isinstance(gateway, dict):
            values["gateway"] = {"listen": _NOBODY, **gateway, "coordinator": _NOBODY}
        return values

    @model_validator(mode="after")
    def _names_once(self) -> Self:
        names = [each.name for each in (*self.environments, *self.reward.environments)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"environments: there are two of the name {', '.join(twice)}")
        return self

    def programs(self) -> dict[str, LocalEnvironment]:
        """The environments that the mesh starts, by name: environment-NAME."""
        return {f"environment-{each.name}": each for each in self.environments}

    def members(self) -> dict[str, ServiceConfig]:
        """The services by name: coordinator, trainer-0, …, sampler-0, …, reward and gateway."""
        return {
            "coordinator": self.coordinator,
            **{f"trainer-{index}": trainer for index, trainer in enumerate(self.trainers)},
            **{f"sampler-{index}": sampler for index, sampler in enumerate(self.samplers)},
            "reward": self.reward,
            **({} if self.gateway is None else {"gateway": self.gateway}),
        }

    def given_addresses(self) -> dict[str, str]:
        """Where members are reached that do not get a free port: the gateway, if it names one."""
        host, _, port = (self.gateway.listen if self.gateway else _NOBODY).rpartition(":")
        return {} if int(port) == 0 else {"gateway": f"{_REACHED_AT.get(host, host)}:{port}"}


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
    environments = [
        EnvironmentConfig.model_validate(
            {
                **each.model_dump(exclude_unset=True, exclude={"command"}),
                "addresses": [addresses[name]],
            }
        )
        for name, each in config.programs().items()
    ]
    complete["reward"] = complete["reward"].model_copy(
        update={"environments": [*config.reward.environments, *environments]}
    )
    complete["coordinator"] = complete["coordinator"].model_copy(
        update={
            "state_dir": state_dir,
            "blobs": blobs,
            "trainers": [addresses[name] for name in complete if name.startswith("trainer-")],
            "samplers": [addresses[name] for name in complete if name.startswith("sampler-")],
            "reward": addresses["reward"],
        }
    )
    if config.gateway is not None:
        reached = {"coordinator": addresses["coordinator"]}
        if config.given_addresses():
            reached["listen"] = config.gateway.listen
        tokenizers = config.gateway.base_models or _tokenizers(config.coordinator)
        complete["gateway"] = complete["gateway"].model_copy(
            update={**reached, "base_models": tokenizers}
        )
    return complete


def _tokenizers(config: CoordinatorConfig) -> list[ServedModel]:
    """Where the coordinator has them: clients on this machine find them there too."""
    return [
        ServedModel(
            name=model.name,
            tokenizer=str(Path(model.tokenizer).expanduser().absolute())
            if Path(model.tokenizer).expanduser().is_dir()
            else model.tokenizer,
        )
        for model in config.base_models
        if model.tokenizer
    ]
