"""Time limits that are fair to the other side."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

TICK_S = 0.25


@contextlib.asynccontextmanager
async def in_ticks(
    limit_s: float, *, signs: Callable[[], object] = lambda: None
) -> AsyncIterator[None]:
    """`asyncio.timeout`, except that a busy loop takes however long it was busy for one tick.

    Else a service that is held up itself would find that nobody had answered in time. The limit
    begins anew whenever what `signs` returns, of the other side's being alive, has changed.
    """
    loop = asyncio.get_running_loop()
    num_left = num_ticks = round(limit_s / TICK_S)
    last = signs()
    ticking: asyncio.TimerHandle

    async with asyncio.timeout(None) as limit:

        def tick() -> None:
            nonlocal last, num_left, ticking
            num_left -= 1
            if signs() != last:
                last, num_left = signs(), num_ticks
            if num_left:
                ticking = loop.call_later(TICK_S, tick)
            else:
                limit.reschedule(loop.time())

        ticking = loop.call_later(TICK_S, tick)
        try:
            yield
        finally:
            ticking.cancel()
