"""One at a time for each adapter, first come, first served."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from rollmesh.errors import MeshError, Overloaded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class _Turn:
    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.num_users = 0


class Turns:
    """Turns by name; at most `max_waiting` wait for the same one.

    Whoever is cancelled while it waits leaves the queue. What `take` has begun goes on without its
    caller, so that somebody sees how it ends; `close` ends it.
    """

    def __init__(self, *, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._turns: dict[str, _Turn] = {}  # of names that somebody waits for or works on
        self._tasks: set[asyncio.Task[Any]] = set()  # at most one for each of them

    @contextlib.asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        """The turn for the length of the block, which ends with its caller.

        Raises:
            Overloaded: too many wait already.
        """
        leave = await self._enter(name)
        try:
            yield
        finally:
            leave()

    async def take(self, name: str, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """What `work` answers, when it is the caller's turn; it goes on without its caller.

        Raises:
            Overloaded: too many wait already.
        """
        leave = await self._enter(name)
        task = asyncio.create_task(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: leave())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_told)
            raise

    async def _enter(self, name: str) -> Callable[[], None]:
        """Wait for the turn; what ends it."""
        turn = self._turns.setdefault(name, _Turn())
        if turn.num_users > self._max_waiting:
            raise Overloaded(
                f"{self._max_waiting} calls wait for {name} already",
                resource=name,
                allowed=self._max_waiting,
            )
        turn.num_users += 1

        def leave() -> None:
            turn.num_users -= 1
            if not turn.num_users:
                del self._turns[name]

        try:
            await turn.lock.acquire()
        except BaseException:
            leave()
            raise

        def end() -> None:
            turn.lock.release()
            leave()

        return end

    def is_busy(self, name: str) -> bool:
        """Whether somebody works on it or waits for it."""
        return name in self._turns

    async def close(self) -> None:
        """End whatever goes on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _told(task: asyncio.Task[Any]) -> None:
    """Log how work ended that nobody waits for."""
    error = None if task.cancelled() else task.exception()
    if isinstance(error, MeshError):
        log.info("after its caller had left: %s", error)
    elif error is not None:
        log.error("failed by a bug after its caller had left", exc_info=error)
