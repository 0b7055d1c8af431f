"""Time limits that are fair to the fleet."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from rollmesh.errors import MeshError
    from services.coordinator.fleet.membership import Fleet


class Limits:
    """Limits that run only while something about a fleet is amiss."""

    def __init__(self, fleet: Fleet) -> None:
        self._limits: dict[asyncio.Timeout, Callable[[], float | None]] = {}
        fleet.on_change(self._look)

    @contextlib.asynccontextmanager
    async def amiss(
        self, is_amiss: Callable[[], bool], *, for_s: float, error: MeshError
    ) -> AsyncIterator[None]:
        """Raise `error` in the block once `is_amiss`, which hangs on the fleet, is true so long."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:
                self._limits[limit] = lambda: loop.time() + for_s if is_amiss() else None
                self._set(limit)
                yield
        except TimeoutError:
            if limit.expired():
                raise error from None
            raise
        finally:
            self._limits.pop(limit, None)

    def _look(self) -> None:
        for limit in self._limits:
            self._set(limit)

    def _set(self, limit: asyncio.Timeout) -> None:
        when = self._limits[limit]()
        # Once it runs it goes on as it began, until what was amiss is well.
        if not limit.expired() and (when is None or limit.when() is None):
            limit.reschedule(when)
