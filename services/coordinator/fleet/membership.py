"""Who is in the mesh, whatever way that is found out."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from rollmesh import types

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    # Only named in quotes.
    from rollmesh import chat
    from services.coordinator.ports import RewardPort, SamplerPort, TrainerPort  # noqa: F401

Port = TypeVar("Port")
Info = TypeVar("Info")


@dataclass(slots=True, eq=False)
class FleetMember(Generic[Port, Info]):
    """One process of the mesh. `info` is what its last good poll said."""

    role: types.MemberRole
    address: str
    port: Port
    poll: Callable[[], Awaitable[Info]]
    serving: bool = False
    problem: str = "not heard of yet"
    info: Info | None = None
    update_time: float = 0.0
    # When its last good poll came, by the event loop's clock; None: it has not come yet.
    heard: float | None = None
    suspected: asyncio.Event = field(default_factory=asyncio.Event)


Trainer = FleetMember["TrainerPort", types.TrainerInfo]
Sampler = FleetMember["SamplerPort", types.SamplerInfo]
Reward = FleetMember["RewardPort", "list[chat.EnvironmentStatus]"]


class Fleet(Protocol):
    """The members and what is known of them: `services/coordinator/fleet/static.py` is one."""

    async def run(self) -> None:
        """Keep it up to date until cancelled."""
        ...

    def trainers(self, base_model: str) -> list[Trainer]:
        """The trainers of `base_model` that serve, by address."""
        ...

    def trainer(self, address: str) -> Trainer | None:
        """The trainer at `address`, serving or not; None: there is none."""
        ...

    def all_trainers(self) -> list[Trainer]:
        """Every trainer, serving or not, by address."""
        ...

    def samplers(self, base_model: str, *, job: str = "") -> list[Sampler]:
        """The samplers of `base_model` that take work, by address; those that `job` may ask."""
        ...

    def refused_by(self, sampler: Sampler) -> frozenset[str]:
        """The jobs that ask nothing of it."""
        ...

    def unserved(self, base_model: str, *, job: str = "") -> str:
        """Why `job` can ask no sampler of `base_model` now; empty: it can."""
        ...

    def base_models(self) -> list[str]:
        """Base models that some member has ever said to serve, sorted."""
        ...

    def environment(self, name: str) -> chat.EnvironmentStatus | None:
        """How an environment was when the reward service last said it; None: it knows none such."""
        ...

    def snapshot(self, num_queued_requests: int) -> types.Fleet:
        """Every member as it is seen now, by role and address."""
        ...

    def suspect(self, member: FleetMember[Port, Info], problem: str) -> None:
        """A call to `member` failed: it is out until it is heard of again."""
        ...

    def quarantine(self, instance_id: str, reason: str) -> None:
        """Keep the sampler process with this instance_id out for as long as it lives."""
        ...

    def refuse(self, job: str, instance_id: str, reason: str) -> None:
        """Keep `job` away from the sampler process with this instance_id, until `forgive`."""
        ...

    def forgive(self, job: str) -> None:
        """`job` has ended, and so has what it holds against samplers."""
        ...

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever a member comes, goes, says something else, or is refused."""
        ...
