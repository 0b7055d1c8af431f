"""Patience with peers that are away for a moment."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, TypeVar

from rollmesh.errors import (
    DeadlineExceeded,
    EnvironmentTimeout,
    EnvironmentUnavailable,
    Overloaded,
    Unavailable,
)
from rollmesh.job import Warned

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from services.coordinator.ports import Lost, Problems

Result = TypeVar("Result")

RETRY_FOR_S = 120.0
"""How long a job puts up with a trainer or a reward service that is away: a restart with a large
model fits in; a job that waits longer should say so by failing."""


def backoff() -> Iterator[float]:
    """Seconds to wait before each next attempt, without end: 0.1, 0.2, … up to 2."""
    delay_s = 0.1
    while True:
        yield delay_s
        delay_s = min(2 * delay_s, 2.0)


class Patience:
    """Repeats calls to one peer while it is away, and says so once for each time that it is.

    `problems`: where it stands, by peer, for as long as it is so.
    """

    def __init__(
        self, peer: str, warn: Callable[[Warned], Awaitable[None]], problems: Problems
    ) -> None:
        self._peer = peer
        self._warn = warn
        self._problems = problems
        self._away: str | None = None

    async def call(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """What `attempt` answers, which must be safe to repeat.

        Raises:
            Unavailable: the peer was away for RETRY_FOR_S.
            MeshError: any other that `attempt` raises, at once.
        """
        loop = asyncio.get_running_loop()
        give_up_at: float | None = None
        for delay_s in backoff():
            try:
                result = await attempt()
            except EnvironmentTimeout:
                # It is there, and was slow: no reason to try for minutes.
                raise
            except (Unavailable, Overloaded, DeadlineExceeded) as error:
                # Not from the start: the attempt itself may have been long.
                if give_up_at is None:
                    give_up_at = loop.time() + RETRY_FOR_S
                peer = "environment" if isinstance(error, EnvironmentUnavailable) else self._peer
                if loop.time() + delay_s > give_up_at:
                    raise Unavailable(
                        f"the {peer} has been away for {RETRY_FOR_S:g} s: {error}",
                        **error.context,
                    ) from error
                await self._say_away(peer, str(error))
                await asyncio.sleep(delay_s)
            else:
                if self._away is not None:
                    self._problems.pop(self._away, None)
                    self._away = None
                return result
        raise AssertionError("backoff never ends")

    async def _say_away(self, peer: str, problem: str) -> None:
        if self._away == peer:
            return
        self._away = peer
        message = f"the {peer} does not answer and is tried again: {problem}"
        self._problems[peer] = message
        await self._warn(Warned(reason=f"{peer.upper()}_UNAVAILABLE", message=message))


class Outage:
    """Says once that a peer is away, until all who waited for it are done."""

    def __init__(
        self, peer: str, warn: Callable[[Warned], Awaitable[None]], problems: Problems
    ) -> None:
        self._peer = peer
        self._warn = warn
        self._problems = problems
        self._waiting: set[object] = set()

    @contextlib.asynccontextmanager
    async def noticed(self) -> AsyncIterator[Lost]:
        """What one call, made inside, is to tell each time that it has to wait for the peer."""
        me = object()

        async def lost(problem: str) -> None:
            first = not self._waiting
            self._waiting.add(me)
            if first:
                reason = f"{self._peer.upper()}_UNAVAILABLE"
                message = f"the job waits for a {self._peer}: {problem}"
                self._problems[self._peer] = message
                await self._warn(Warned(reason=reason, message=message))

        try:
            yield lost
        finally:
            self._waiting.discard(me)
            if not self._waiting:
                self._problems.pop(self._peer, None)
