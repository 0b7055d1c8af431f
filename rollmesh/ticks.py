"""Time limits that are fair to the other side."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TICK_S = 0.25


@contextlib.asynccontextmanager
async def in_ticks(limit_s: float) -> AsyncIterator[None]:
    """`asyncio.timeout`, except that a busy loop takes however long it was busy for one tick.

    Else a service that is held up itself would find that nobody had answered in time.
    """
    loop = asyncio.get_running_loop()
    num_left = round(limit_s / TICK_S)
    ticking: asyncio.TimerHandle

    async with asyncio.timeout(None) as limit:

        def tick() -> None:
            nonlocal num_left, ticking
            num_left -= 1
            if num_left:
                ticking = loop.call_later(TICK_S, tick)
            else:
                limit.reschedule(loop.time())

        ticking = loop.call_later(TICK_S, tick)
        try:
            yield
        finally:
            ticking.cancel()
