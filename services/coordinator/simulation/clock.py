"""Simulated time: callbacks in the order of their times, and of their being asked for."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Clock:
    """`now` is in seconds; it moves from one event to the next."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, time: float, event: Callable[[], None]) -> None:
        """Call `event` at `time`, or now if that has passed."""
        self._count += 1
        heapq.heappush(self._events, (max(time, self.now), self._count, event))

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Call `event` in so many seconds."""
        self.at(self.now + seconds, event)

    def step(self) -> bool:
        """The next event; False: there is none."""
        if not self._events:
            return False
        self.now, _, event = heapq.heappop(self._events)
        event()
        return True
