"""A stream that says something at short intervals for as long as the engine under it does."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rollmesh.types import HEARTBEAT_S

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine

Item = TypeVar("Item")

_MAX_AHEAD = 64
"""Items that a producer is ahead of a reader who is slow."""
_AGAIN_S = 0.05
"""Until the engine is asked again whether it is alive."""


class Pipe(Generic[Item]):
    """Between one producer and one reader. Neither waits for a timer: those act in silence only."""

    def __init__(self) -> None:
        self._items: deque[Item | None] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._done = False

    async def put(self, item: Item) -> None:
        """Add an item, once the reader is not too far behind."""
        while len(self._items) >= _MAX_AHEAD:
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer
        self._add(item)

    def beat(self) -> None:
        """Add a sign of life, if the reader waits."""
        if not self._items and not self._done:
            self._add(None)

    def _add(self, item: Item | None) -> None:
        self._items.append(item)
        _wake(self._reader)

    def close(self, _task: object = None) -> None:
        """No more items come."""
        self._done = True
        _wake(self._reader)

    async def take(self) -> bool:
        """Wait for an item; False: no more come."""
        while not self._items and not self._done:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return bool(self._items)

    def next(self) -> Item | None:
        """The item that was waited for."""
        item = self._items.popleft()
        _wake(self._writer)
        return item


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


async def with_heartbeats(
    produce: Callable[[Pipe[Item]], Coroutine[Any, Any, None]], silent_s: Callable[[], float]
) -> AsyncGenerator[Item | None]:
    """What `produce` puts into its pipe, and None whenever nothing came for HEARTBEAT_S.

    No None comes while the engine itself has been silent for longer than that: the reader shall not
    take for its life what is only this process's. Closing the stream cancels `produce`.
    """
    loop = asyncio.get_running_loop()
    pipe: Pipe[Item] = Pipe()
    sent_at = loop.time()
    ticking: asyncio.TimerHandle

    def tick() -> None:
        nonlocal ticking
        now = loop.time()
        due = sent_at + HEARTBEAT_S
        if now >= due and silent_s() < HEARTBEAT_S:
            pipe.beat()
            due = now + HEARTBEAT_S
        ticking = loop.call_at(max(due, now + _AGAIN_S), tick)

    ticking = loop.call_later(HEARTBEAT_S, tick)
    producing = loop.create_task(produce(pipe))
    producing.add_done_callback(pipe.close)
    try:
        while await pipe.take():
            item = pipe.next()
            sent_at = loop.time()
            yield item
        await producing
    finally:
        ticking.cancel()
        producing.cancel()
        await asyncio.wait([producing])
        if not producing.cancelled():
            producing.exception()  # It was told above, or came after the reader had left.
