"""Samples of a project that may not be begun yet: first come, first begun."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING

from rollmesh import types

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Lines:
    """One for each project, of which at most `max_begun` are out of the line at once."""

    def __init__(self, max_begun: int) -> None:
        self._max_begun = max_begun
        # By project: the names in line, in order, and how many more may be begun.
        self._lines: defaultdict[str, dict[str, None]] = defaultdict(dict)
        self._room: weakref.WeakValueDictionary[str, asyncio.Semaphore] = (
            weakref.WeakValueDictionary()
        )

    def __len__(self) -> int:
        """Projects with something in line or begun, each once or twice."""
        return len(self._lines) + len(self._room)

    @contextlib.asynccontextmanager
    async def turn(self, project: str, name: str) -> AsyncIterator[None]:
        """Wait for the turn of `name`; while the block runs it has begun."""
        room = self._room.setdefault(project, asyncio.Semaphore(self._max_begun))
        self._lines[project][name] = None
        try:
            await room.acquire()
        finally:
            del self._lines[project][name]
            if not self._lines[project]:
                del self._lines[project]
        try:
            yield
        finally:
            room.release()

    def waiting(self, project: str, name: str, *, since: float) -> types.Waiting | None:
        """Why it is in line; None: it is not."""
        line = self._lines.get(project, {})
        if name not in line:
            return None
        num_ahead = list(line).index(name)
        return types.Waiting(
            subject=name,
            rule="ORDER",
            reason=f"{self._max_begun} futures of sampling of its project have begun, and "
            f"{num_ahead} go first",
            release="the end of one of those that have begun, and then its turn",
            position=1 + num_ahead,
            since=since,
        )
