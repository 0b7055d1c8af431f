"""Work that goes to its end, whoever still waits for it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")


class Uninterrupted:
    """Runs coroutines while its block lasts, which ends when all of them have.

    It does not bound their number: whoever calls `run` does.
    """

    def __init__(self) -> None:
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        # The group is not told why the block ends: it would cancel what has begun.
        await self._tasks.__aexit__(None, None, None)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns or raises; it goes on when the caller is cancelled."""
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._tasks.create_task(_settle(work, outcome))
        return await asyncio.shield(outcome)


async def _settle(work: Coroutine[Any, Any, T], outcome: asyncio.Future[T]) -> None:
    try:
        outcome.set_result(await work)
    except Exception as error:  # noqa: BLE001 - it is the caller's, and must not end the others
        outcome.set_exception(error)
