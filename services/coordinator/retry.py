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
THERE_S = 30.0
"""An attempt that found its peer gone after longer had found it there at first. Who is away is
noticed sooner: a connection that is lost after 25 s (KEEPALIVE_S and KEEPALIVE_TIMEOUT_S in
rollmesh/rpc/channel.py), one that cannot be made after gRPC's 20 s, and the reward service refuses
calls of an environment that has been away for its patience_s at once."""


def backoff() -> Iterator[float]:
    """Seconds to wait before each next attempt, without end: 0.1, 0.2, … up to 2."""
    delay_s = 0.1
    while True:
        yield delay_s
        delay_s = min(2 * delay_s, 2.0)


class Patience:
    """Repeats calls to one peer while it is away, and says so once for each time that it is.

    `problems`: where it stands, by peer, for as long as a call waits for it.
    """

    def __init__(
        self, peer: str, warn: Callable[[Warned], Awaitable[None]], problems: Problems
    ) -> None:
        self._peer = peer
        self._outages = {
            each: Outage(
                each, warn, problems, says=f"the {each} does not answer and is tried again"
            )
            for each in (peer, "environment")
        }

    async def call(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """What `attempt` answers, which must be safe to repeat.

        Raises:
            Unavailable: the peer was away for RETRY_FOR_S, in which no attempt got far.
            MeshError: any other that `attempt` raises, at once.
        """
        clock = asyncio.get_running_loop().time
        give_up_at: float | None = None
        delays = backoff()
        told: dict[str, Lost] = {}
        async with contextlib.AsyncExitStack() as waiting:
            while True:
                begun = clock()
                try:
                    return await attempt()
                except EnvironmentTimeout:
                    # It is there, and was slow: no reason to try for minutes.
                    raise
                except (Unavailable, Overloaded, DeadlineExceeded) as error:
                    away = error
                # Not from the start: the attempt itself may have been long.
                was_there = isinstance(away, Unavailable) and clock() - begun > THERE_S
                if give_up_at is None or was_there:
                    await waiting.aclose()
                    told.clear()
                    give_up_at, delays = clock() + RETRY_FOR_S, backoff()
                peer = "environment" if isinstance(away, EnvironmentUnavailable) else self._peer
                delay_s = next(delays)
                if clock() + delay_s > give_up_at:
                    raise Unavailable(
                        f"the {peer} has been away for {RETRY_FOR_S:g} s: {away}",
                        **away.context,
                    ) from away
                if peer not in told:
                    outage = self._outages[peer]
                    told[peer] = await waiting.enter_async_context(outage.noticed())
                await told[peer](str(away))
                await asyncio.sleep(delay_s)


class Outage:
    """Says once that a peer is away, until all who waited for it are done."""

    def __init__(
        self,
        peer: str,
        warn: Callable[[Warned], Awaitable[None]],
        problems: Problems,
        *,
        says: str = "",
    ) -> None:
        self._peer = peer
        self._says = says or f"the job waits for a {peer}"
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
                message = f"{self._says}: {problem}"
                self._problems[self._peer] = message
                await self._warn(Warned(reason=reason, message=message))

        try:
            yield lost
        finally:
            self._waiting.discard(me)
            if not self._waiting:
                self._problems.pop(self._peer, None)
