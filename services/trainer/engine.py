"""The one thread that computes, and the queue before it.

Ops run one after the other in the order of their arrival. One whose caller goes away before it
begins never runs; one that has begun runs to its end, so that a retry finds its result.
"""

from __future__ import annotations

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from rollmesh.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")


class Engine:
    """Runs ops; at most `max_queued_ops` wait."""

    def __init__(self, *, max_queued_ops: int) -> None:
        self._max_queued_ops = max_queued_ops
        self._queued = 0
        self._turn = asyncio.Lock()  # First come, first served.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trainer-engine")

    async def run(self, op: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `op` returns or raises, run in the thread when its turn comes.

        Raises:
            Overloaded: max_queued_ops wait already.
        """
        if self._queued >= self._max_queued_ops:
            raise Overloaded(
                f"{self._queued} ops wait, max_queued_ops is {self._max_queued_ops}",
                resource="queued ops",
                value=self._queued,
                allowed=self._max_queued_ops,
            )
        self._queued += 1
        try:
            await self._turn.acquire()
        finally:
            self._queued -= 1
        # The thread sees the caller's trace and log fields.
        call = partial(contextvars.copy_context().run, op, *args, **kwargs)
        running = asyncio.get_running_loop().run_in_executor(self._thread, call)
        running.add_done_callback(lambda _: self._turn.release())
        return await asyncio.shield(running)

    def close(self) -> None:
        """Return when the op that runs has ended; no other is begun."""
        self._thread.shutdown(cancel_futures=True)
