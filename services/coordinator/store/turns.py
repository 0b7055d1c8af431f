"""One at a time of each project, and none waits for another project's.

One coordinator per database: whoever takes turns here is all there is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Turns:
    """A lock for each project that somebody holds or waits for, and for no other."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: Counter[str] = Counter()

    def __len__(self) -> int:
        """How many projects have somebody who holds or waits."""
        return len(self._locks)

    @contextlib.asynccontextmanager
    async def of(self, project: str) -> AsyncIterator[None]:
        """Until the block ends it is this one's turn."""
        lock = self._locks.setdefault(project, asyncio.Lock())
        self._users[project] += 1
        try:
            async with lock:
                yield
        finally:
            self._users[project] -= 1
            if not self._users[project]:
                del self._users[project], self._locks[project]
