"""Tokens of each project by day, in UTC: prompts when they get a place, drawn ones as they come."""

from __future__ import annotations

from collections import defaultdict

DAY_S = 86400


class Usage:
    """What was used today, and what of it is not written down yet.

    One number for each project that was served today; those of other days are in the store. It goes
    by the latest time that it was told: tokens that come before the next one count for that day.
    """

    def __init__(self) -> None:
        self.day = -1
        self._used: dict[str, int] = {}
        # By project and day: of prompts, and drawn.
        self._unwritten: defaultdict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])

    def at(self, now: float) -> None:
        """It is `now`."""
        day = int(now // DAY_S)
        if day > self.day:
            self.day = day
            self._used.clear()

    def used(self, project: str) -> int:
        """Tokens of `project` today."""
        return self._used.get(project, 0)

    def count(self, project: str, *, prompt: int = 0, drawn: int = 0) -> None:
        """It used so many more."""
        self._used[project] = self._used.get(project, 0) + prompt + drawn
        unwritten = self._unwritten[project, self.day]
        unwritten[0] += prompt
        unwritten[1] += drawn

    def restore(self, project: str, day: int, tokens: int) -> None:
        """`tokens` are written down for `day`, counted from 1970."""
        self.at(day * DAY_S)
        if day == self.day:
            self._used[project] = tokens + sum(self._unwritten.get((project, day), ()))

    def take(self) -> dict[tuple[str, int], tuple[int, int]]:
        """What to add to what is written down: tokens of prompts and drawn, by project and day."""
        taken = {key: (prompt, drawn) for key, (prompt, drawn) in self._unwritten.items()}
        self._unwritten.clear()
        return taken


def until_midnight(now: float) -> float:
    """Seconds of today that are left."""
    return DAY_S - now % DAY_S
