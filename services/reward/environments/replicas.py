"""The replicas of one environment: found by name, watched, and of one version."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rollmesh.errors import Unavailable
from services.reward.environments.description import difference
from services.reward.environments.replica import Replica

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rollmesh import chat
    from services.reward.environments.config import EnvironmentConfig
    from services.reward.environments.ports import Connect, Resolve

log = logging.getLogger(__name__)

RESOLVE_INTERVAL_S = 2.0
MOST_PROBLEMS = 3
"""Replicas whose problems are told; of the others only how many they are."""
LONGEST_PROBLEM = 300
"""Characters of each: what they say is the servers' own."""


class Replicas:
    """Keeps up to date which replicas there are, and which of them take work; see `run`.

    All that take work say the same of the environment: what the first one said, until none is left
    that says it. Then it is the turn of what others say.

    Attributes:
        agreed: what that is; None: none has been up yet.
    """

    def __init__(self, config: EnvironmentConfig, connect: Connect, resolve: Resolve) -> None:
        self.agreed: chat.EnvironmentInfo | None = None
        self._config = config
        self._connect = connect
        self._resolve = resolve
        self._replicas: dict[str, Replica] = {}
        self._unresolved = dict.fromkeys(_addresses(config), "not looked up yet")
        self._listeners: list[Callable[[], None]] = []

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas.values())

    def __len__(self) -> int:
        """Of those whose names lead there; a name that leads nowhere counts as one."""
        return sum(not replica.leaving for replica in self) + len(self._unresolved)

    def working(self) -> list[Replica]:
        """Those that take work."""
        now = asyncio.get_running_loop().time()
        return [replica for replica in self if replica.takes_work(now)]

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever one comes, goes, or has room again."""
        self._listeners.append(listener)

    def problem(self) -> str:
        """What is wrong with those that take no work; empty: nothing."""
        where = [
            *self._unresolved.items(),
            *((each.place, each.problem) for each in self if not each.leaving),
        ]
        problems = [f"{place}: {problem[:LONGEST_PROBLEM]}" for place, problem in where if problem]
        num_more = len(problems) - MOST_PROBLEMS
        more = [f"and {num_more} more"] if num_more > 0 else []
        return "; ".join([*problems[:MOST_PROBLEMS], *more])

    async def run(self) -> None:
        """Watch them until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for address in _addresses(self._config):
                tasks.create_task(self._follow(address, tasks))

    async def _follow(self, address: str, tasks: asyncio.TaskGroup) -> None:
        """Have a replica for each place that `address` leads to."""
        watching: dict[str, asyncio.Task[None]] = {}
        while True:
            try:
                places = set(await self._resolve(address))
            except Unavailable as error:
                # What it led to when it last led anywhere is as good as it gets.
                if not watching:
                    self._unresolved[address] = str(error)
            else:
                self._unresolved.pop(address, None)
                for place in sorted(places - self._replicas.keys()):
                    watching[place] = tasks.create_task(self._add(place, address).watch())
                for place in list(watching):
                    replica = self._replicas[place]
                    if replica.leaving != (place not in places):
                        replica.leaving = not replica.leaving
                        self._changed()
                    if replica.leaving and replica.room.is_idle:
                        watching.pop(place).cancel()
                        del self._replicas[place]
            await asyncio.sleep(RESOLVE_INTERVAL_S)

    def _add(self, place: str, authority: str) -> Replica:
        connection = self._connect(place, authority)
        replica = Replica(
            self._config, place, connection, changed=self._changed, freed=self._notify
        )
        self._replicas[place] = replica
        return replica

    def _changed(self) -> None:
        up = [(replica, replica.info) for replica in self if replica.info and not replica.leaving]
        if up and not any(self._is_agreed(info) for _, info in up):
            self.agreed = up[0][1]
        for replica, info in up:
            refusal = "" if self.agreed is None else difference(info, self.agreed)
            if refusal and not replica.refusal:
                log.warning("%s at %s: %s", self._config.name, replica.place, refusal)
            replica.refusal = refusal
        self._notify()

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()

    def _is_agreed(self, info: chat.EnvironmentInfo) -> bool:
        return self.agreed is not None and not difference(info, self.agreed)


def _addresses(config: EnvironmentConfig) -> list[str]:
    return [address.removeprefix("dns:///") for address in config.addresses]
