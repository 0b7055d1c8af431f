"""What is under way at one replica, and for how much more there is room."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.reward.environments.run import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh.errors import MeshError
    from services.reward.environments.run import Run

MOST_UNHEARD = 256
"""Calls begun at a replica and not heard of: neither answered nor followed by an answered poll.
Servers made of gRPC's core drop calls at random when more than 1,000 have come that they have not
begun to work on, and answer no poll in time while they have that many before it."""
LONGEST_FULL_S = 1.0
"""For which a replica that says RESOURCE_EXHAUSTED is left alone, whatever it says itself."""


class Room:
    """Counts what is under way.

    Attributes:
        max_episodes: as the replica says it; 0: as many as other calls.
        full_until: by the event loop's clock: until then it is to get nothing.
    """

    def __init__(self, max_concurrent: int, *, freed: Callable[[], None]) -> None:
        """`freed` is called when there is room again."""
        self.max_episodes = 0
        self.full_until = 0.0
        self._max_concurrent = max_concurrent
        self._freed = freed
        self._runs: set[Run] = set()
        self._unheard: set[Run] = set()
        self._num = dict.fromkeys(Kind, 0)

    @property
    def num_running(self) -> int:
        """Episodes and Score calls under way."""
        return self._num[Kind.EPISODE] + self._num[Kind.SCORE]

    @property
    def num_episodes(self) -> int:
        """Episodes under way."""
        return self._num[Kind.EPISODE]

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._runs

    def has(self, kind: Kind, now: float) -> bool:
        """Whether one more such call may begin now."""
        return len(self._unheard) < MOST_UNHEARD and self.num_free(kind, now) > 0

    def num_free(self, kind: Kind, now: float) -> int:
        """Such calls for which there is room, though not all at once."""
        if now < self.full_until:
            return 0
        if kind is Kind.READ:
            return self._max_concurrent
        free = self._max_concurrent - self.num_running
        if kind is Kind.EPISODE and self.max_episodes:
            free = min(free, self.max_episodes - self.num_episodes)
        return max(free, 0)

    def enter(self, run: Run) -> None:
        """It has begun."""
        self._runs.add(run)
        self._unheard.add(run)
        self._num[run.kind] += 1

    def leave(self, run: Run) -> None:
        """It is over."""
        self._runs.discard(run)
        self._unheard.discard(run)
        self._num[run.kind] -= 1
        if not run.refused:
            # Whatever the replica had said, there is room now.
            self.full_until = 0.0
        self._freed()

    def refuse_until(self, now: float, retry_after_s: float) -> None:
        """The replica said RESOURCE_EXHAUSTED."""
        self.full_until = now + min(retry_after_s, LONGEST_FULL_S)

    def unheard(self) -> set[Run]:
        """Those of which nothing has been heard yet."""
        return set(self._unheard)

    def heard_of(self, runs: set[Run]) -> None:
        """The replica has begun to work on `runs`, and so on what came before them."""
        was_full = len(self._unheard) >= MOST_UNHEARD
        self._unheard -= runs
        if was_full and runs:
            self._freed()

    def break_off(self, error: Callable[[], MeshError]) -> None:
        """End all that is under way with `error`, made anew for each."""
        for run in list(self._runs):
            run.break_off(error())
