"""The fleet as a fixed list of members, each polled for what it serves and whether it answers.

A member serves from its first good poll on. One that fails a call is out at once, and polled at
once: where the call and not the member was at fault, it is back within a round trip.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from rollmesh import chat, types
from rollmesh.errors import MeshError
from rollmesh.ticks import in_ticks
from services.coordinator.fleet.membership import FleetMember, Info, Port
from services.coordinator.fleet.refusals import Refusals

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from services.coordinator.fleet.membership import Reward, Sampler, Trainer
    from services.coordinator.ports import RewardPort, SamplerPort, TrainerPort

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.5
DRAINING = "draining"
"""What GetFleet says of a member that finishes what it has and is given nothing more."""
POLL_TIMEOUT_S = 1.25
"""A member that does not answer a poll within this time is out, so that one which stalls is known
to within two seconds. All of them compute beside what answers."""


class StaticFleet:
    """Keeps up to date which of the configured members serve, and what; see `run`."""

    def __init__(
        self,
        *,
        trainers: Mapping[str, TrainerPort],
        samplers: Mapping[str, SamplerPort],
        rewards: Mapping[str, RewardPort],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Ports by address (host:port); `clock` gives Unix seconds."""
        self._trainers: list[Trainer] = [
            FleetMember("trainer", address, port, port.get_trainer)
            for address, port in sorted(trainers.items())
        ]
        self._samplers: list[Sampler] = [
            FleetMember("sampler", address, port, port.get_sampler)
            for address, port in sorted(samplers.items())
        ]
        self._rewards: list[Reward] = [
            FleetMember("reward", address, port, port.list_environments)
            for address, port in sorted(rewards.items())
        ]
        self._clock = clock
        # The last instance and its reason, by address: at most one for each sampler.
        self._quarantined: dict[str, tuple[str, str]] = {}
        self._refusals = Refusals()
        self._listeners: list[Callable[[], None]] = []

    async def run(self) -> None:
        """Poll every member until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for trainer in self._trainers:
                tasks.create_task(self._watch(trainer))
            for sampler in self._samplers:
                tasks.create_task(self._watch(sampler))
            for reward in self._rewards:
                tasks.create_task(self._watch(reward))

    def trainers(self, base_model: str) -> list[Trainer]:
        """The trainers of `base_model` that serve, by address."""
        return [
            member
            for member in self._trainers
            if member.serving and member.info and member.info.base_model == base_model
        ]

    def trainer(self, address: str) -> Trainer | None:
        """The trainer at `address`, serving or not; None: none is configured there."""
        return next((member for member in self._trainers if member.address == address), None)

    def all_trainers(self) -> list[Trainer]:
        """Every configured trainer, serving or not, by address."""
        return list(self._trainers)

    def samplers(self, base_model: str, *, job: str = "") -> list[Sampler]:
        """The samplers of `base_model` that take work, by address; those that `job` may ask."""
        return [
            member
            for member in self._samplers
            if member.serving and member.info and member.info.base_model == base_model
            if not member.info.draining and job not in self.refused_by(member)
        ]

    def refused_by(self, sampler: Sampler) -> frozenset[str]:
        """The jobs that ask nothing of it."""
        return self._refusals.jobs(sampler.info.instance_id) if sampler.info else frozenset()

    def unserved(self, base_model: str, *, job: str = "") -> str:
        """Why `job` can ask no sampler of `base_model` now; empty: it can."""
        if self.samplers(base_model, job=job):
            return ""
        if self.samplers(base_model):
            return f"all samplers of {base_model!r} that serve are in quarantine for {job}"
        return f"no sampler of {base_model!r} serves now"

    def base_models(self) -> list[str]:
        """Base models that some member has ever said to serve, sorted."""
        trained = {member.info.base_model for member in self._trainers if member.info}
        sampled = {member.info.base_model for member in self._samplers if member.info}
        return sorted(trained | sampled)

    def environment(self, name: str) -> chat.EnvironmentStatus | None:
        """How an environment was when the reward service last said it; None: it knows none such."""
        return next((status for _, status in self._environments() if status.name == name), None)

    def _environments(self) -> list[tuple[Reward, chat.EnvironmentStatus]]:
        return [(member, status) for member in self._rewards for status in member.info or []]

    def snapshot(self, num_queued_requests: int) -> types.Fleet:
        """Every member as it is seen now, by role and address."""
        return types.Fleet(
            members=(
                *(
                    _told(
                        member,
                        base_model=member.info.base_model if member.info else "",
                        num_adapters=member.info.num_adapters if member.info else 0,
                        draining=bool(member.info and member.info.draining),
                    )
                    for member in self._trainers
                ),
                *(
                    _told(
                        member,
                        base_model=member.info.base_model if member.info else "",
                        num_adapters=len(member.info.loaded) if member.info else 0,
                        num_running=member.info.num_running if member.info else 0,
                        backend=member.info.backend if member.info else "",
                        draining=bool(member.info and member.info.draining),
                        held_against=self._held_against(member),
                    )
                    for member in self._samplers
                ),
                *(_told(member) for member in self._rewards),
                *(
                    types.Member(
                        role="environment",
                        address=status.name,
                        serving=member.serving and status.serving,
                        problem=status.problem if member.serving else member.problem,
                        num_running=status.num_running,
                        update_time=member.update_time,
                    )
                    for member, status in self._environments()
                ),
            ),
            num_queued_requests=num_queued_requests,
        )

    def suspect(self, member: FleetMember[Port, Info], problem: str) -> None:
        """A call to `member` failed: it is out until its next good poll, which comes at once."""
        self._down(member, problem)
        member.suspected.set()

    def quarantine(self, instance_id: str, reason: str) -> None:
        """Keep the sampler process with this instance_id out for as long as it lives.

        One that is gone already is let be: whatever runs there now is another process.
        """
        for sampler in self._samplers:
            if sampler.info and sampler.info.instance_id == instance_id:
                self._quarantined[sampler.address] = instance_id, reason
                self._down(sampler, _quarantined(reason))

    def refuse(self, job: str, instance_id: str, reason: str) -> None:
        """Keep `job` away from the sampler process with this instance_id, until `forgive`.

        Of one job alone: what a tenant holds against a sampler must not take it from others.
        """
        self._refusals.add(job, instance_id, reason)
        log.warning("the sampler %s is in quarantine for %s: %s", instance_id, job, reason)
        self._notify()

    def forgive(self, job: str) -> None:
        """`job` has ended, and so has what it holds against samplers."""
        if self._refusals.drop(job):
            self._notify()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever a member comes, goes, says something else, or is refused."""
        self._listeners.append(listener)

    async def _watch(self, member: FleetMember[Port, Info]) -> None:
        while True:
            member.suspected.clear()
            try:
                async with in_ticks(POLL_TIMEOUT_S):
                    info = await member.poll()
            except TimeoutError:
                self._down(member, f"no answer within {POLL_TIMEOUT_S:g} s")
            except MeshError as error:
                self._down(member, str(error))
            else:
                self._heard(member, info)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_INTERVAL_S):
                    await member.suspected.wait()

    def _heard(self, member: FleetMember[Port, Info], info: Info) -> None:
        if isinstance(info, types.SamplerInfo):
            instance_id, reason = self._quarantined.get(member.address, (None, ""))
            if info.instance_id == instance_id:
                self._down(member, _quarantined(reason))
                return
        self._up(member, info)

    def _up(self, member: FleetMember[Port, Info], info: Info) -> None:
        changed = not member.serving or member.info != info
        if not member.serving:
            log.info("%s at %s serves", member.role, member.address)
        member.serving, member.problem, member.info = True, "", info
        member.update_time = self._clock()
        member.heard = asyncio.get_running_loop().time()
        if changed:
            self._notify()

    def _down(self, member: FleetMember[Port, Info], problem: str) -> None:
        changed = member.serving
        if changed:
            log.warning("%s at %s is lost: %s", member.role, member.address, problem)
        member.serving, member.problem = False, problem
        member.update_time = self._clock()
        if changed:
            self._notify()

    def _held_against(self, sampler: Sampler) -> str:
        return self._refusals.problem(sampler.info.instance_id) if sampler.info else ""

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()


def _quarantined(reason: str) -> str:
    return f"quarantined: {reason}"


def _told(
    member: FleetMember[Port, Info],
    *,
    base_model: str = "",
    num_adapters: int = 0,
    num_running: int = 0,
    backend: str = "",
    draining: bool = False,
    held_against: str = "",
) -> types.Member:
    problem = DRAINING if draining else held_against
    return types.Member(
        role=member.role,
        address=member.address,
        serving=member.serving,
        base_model=base_model,
        problem=problem if member.serving else member.problem,
        num_adapters=num_adapters,
        num_running=num_running,
        update_time=member.update_time,
        backend=backend,
    )
