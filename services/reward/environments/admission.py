"""Who is called where, and who waits: of one environment, so that none holds up another.

Calls of a kind go in the order in which they came, each to the replica with the least to do among
those that take work and have room. A call that has been tried before goes first.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rollmesh.errors import EnvironmentUnavailable, Overloaded
from rollmesh.telemetry import record
from services.reward.environments.run import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh.errors import MeshError
    from services.reward.environments.config import EnvironmentConfig
    from services.reward.environments.replica import Replica
    from services.reward.environments.replicas import Replicas
    from services.reward.environments.run import Run


@dataclass(slots=True, eq=False)
class _Waiter:
    kind: Kind
    number: int
    avoid: Replica | None
    granted: asyncio.Future[Run] = field(default_factory=asyncio.Future)


class Admission:
    """Gives out places at replicas."""

    def __init__(self, config: EnvironmentConfig, replicas: Replicas) -> None:
        self._config = config
        self._replicas = replicas
        # Bounded by max_waiting, the free places, and calls that had a place before. Ordered
        # dictionaries, whose first entry is found at once however many went before it.
        self._queues: dict[Kind, collections.OrderedDict[_Waiter, None]] = {
            kind: collections.OrderedDict() for kind in Kind
        }
        self._numbers = itertools.count(1)
        self._begun = itertools.count(1)
        self._none_since: float | None = None
        self._waking: asyncio.TimerHandle | None = None
        self._closed: Callable[[], MeshError] | None = None
        replicas.on_change(self._grant)

    @property
    def num_waiting(self) -> int:
        """Calls that wait."""
        return sum(map(len, self._queues.values()))

    async def enter(self, kind: Kind, *, avoid: Replica | None = None, again: bool = False) -> Run:
        """A place for a call; leave it.

        `avoid`: where it failed before, which is taken if there is no other; `again`: it had a
        place before, and goes first.

        Raises:
            EnvironmentUnavailable: no replica has taken work for patience_s.
            Overloaded: max_waiting calls of the kind wait.
        """
        begun = time.perf_counter()
        run = await self._entered(kind, avoid, again=again)
        waited = time.perf_counter() - begun
        record("rollmesh.environment.waiting", waited, environment=self._config.name)
        return run

    def close(self, error: Callable[[], MeshError]) -> None:
        """Refuse with `error`, made anew for each, whoever waits or comes."""
        self._closed = error
        self._refuse_all(error)

    async def _entered(self, kind: Kind, avoid: Replica | None, *, again: bool) -> Run:
        if self._closed is not None:
            raise self._closed()
        queue = self._queues[kind]
        now = asyncio.get_running_loop().time()
        if again or not queue:
            replica = self._choice(kind, avoid, now)
            if replica is not None:
                return self._begin(replica, kind)
        self._note_whether_any_works(now)
        if self._is_hopeless(now):
            raise self._unavailable()
        if not again and len(queue) >= self._config.max_waiting + self._num_free(kind, now):
            raise self._overloaded(len(queue))
        waiter = _Waiter(kind, next(self._numbers), avoid)
        queue[waiter] = None
        if again:
            queue.move_to_end(waiter, last=False)
        self._wake_in_time(now)
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            # It may have been given its place in the very moment in which it was given up.
            if not waiter.granted.cancelled() and waiter.granted.exception() is None:
                waiter.granted.result().give_back()
            raise
        finally:
            queue.pop(waiter, None)

    def _grant(self) -> None:
        """Give out what there is to whoever waits."""
        now = asyncio.get_running_loop().time()
        self._note_whether_any_works(now)
        if not any(self._queues.values()):
            return
        if self._is_hopeless(now):
            self._refuse_all(self._unavailable)
            return
        while self._grant_one(now):
            pass
        self._wake_in_time(now)

    def _grant_one(self, now: float) -> bool:
        heads = [next(iter(queue)) for queue in self._queues.values() if queue]
        for waiter in sorted(heads, key=lambda head: head.number):
            if waiter.granted.done():  # It has been given up, and is about to go.
                self._queues[waiter.kind].pop(waiter)
                return True
            replica = self._choice(waiter.kind, waiter.avoid, now)
            if replica is not None:
                self._queues[waiter.kind].pop(waiter)
                waiter.granted.set_result(self._begin(replica, waiter.kind))
                return True
        return False

    def _choice(self, kind: Kind, avoid: Replica | None, now: float) -> Replica | None:
        return min(
            (
                replica
                for replica in self._replicas
                if replica.takes_work(now) and replica.room.has(kind, now)
            ),
            # Of those with as much to do, the one whose turn was longest ago.
            key=lambda replica: (replica is avoid, replica.room.num_running, replica.last_begun),
            default=None,
        )

    def _num_free(self, kind: Kind, now: float) -> int:
        """Calls that wait for their turn alone, and not for room."""
        working = (replica for replica in self._replicas if replica.takes_work(now))
        return sum(replica.room.num_free(kind, now) for replica in working)

    def _begin(self, replica: Replica, kind: Kind) -> Run:
        replica.last_begun = next(self._begun)
        return replica.begin(kind)

    def _note_whether_any_works(self, now: float) -> None:
        if any(replica.takes_work(now) for replica in self._replicas):
            self._none_since = None
        elif self._none_since is None:
            self._none_since = now

    def _is_hopeless(self, now: float) -> bool:
        since = self._none_since
        return since is not None and now >= since + self._config.patience_s

    def _wake_in_time(self, now: float) -> None:
        """Look again when patience is over, or a replica can be tried that is left alone now."""
        if self._waking is not None:
            self._waking.cancel()
            self._waking = None
        times = [
            when
            for replica in self._replicas
            for when in (replica.room.full_until, replica.breaker.open_until)
            if when is not None and when > now
        ]
        if self._none_since is not None:
            times.append(self._none_since + self._config.patience_s)
        if times:
            self._waking = asyncio.get_running_loop().call_at(min(times), self._grant)

    def _refuse_all(self, error: Callable[[], MeshError]) -> None:
        for queue in self._queues.values():
            for waiter in queue:
                if not waiter.granted.done():
                    waiter.granted.set_exception(error())
            queue.clear()

    def _unavailable(self) -> EnvironmentUnavailable:
        name = self._config.name
        return EnvironmentUnavailable(
            f"environment {name!r} has no replica that takes work: {self._replicas.problem()}",
            environment=name,
        )

    def _overloaded(self, num_waiting: int) -> Overloaded:
        name = self._config.name
        return Overloaded(
            f"environment {name!r}: {num_waiting} calls wait for room there, the most that may",
            environment=name,
            field="max_waiting",
            value=num_waiting,
            allowed=self._config.max_waiting,
        )
