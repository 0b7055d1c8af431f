"""What the work of futures is to those who keep and order it: bytes, and who can do them."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from rollmesh import types
from rollmesh.errors import (
    DeadlineExceeded,
    Fenced,
    MeshError,
    Overloaded,
    QuotaExceeded,
    Unavailable,
)
from services.coordinator.retry import backoff

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

Result = TypeVar("Result")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Work:
    """Equal work has equal bytes. `adapter`: that it trains as an op; empty: it is no op."""

    body: bytes
    adapter: str = ""
    samples: bool = False


class Works(Protocol):
    """Does it: services/coordinator/servicers/work.py is one."""

    async def do(self, future: str, body: bytes, sequence: int) -> bytes:
        """The result of the work of `future`, by name; a training op has that sequence, else 0.

        A repeat is safe, and of a training op answers what it answered before.

        Raises:
            MeshError: as the call of the same work does.
        """
        ...

    async def sample(self, future: str, body: bytes, told: Callable[[str], None]) -> bytes:
        """The result of sampling; `told` hears under which subject the scheduler has it."""
        ...

    def failure(self, error: MeshError) -> bytes:
        """`error` as a result."""
        ...


@dataclass(frozen=True, slots=True)
class FutureState:
    """One future as it is now. `result`: of one that is done. `create_time`: Unix seconds."""

    name: str
    create_time: float
    result: bytes | None = None
    waiting: types.Waiting | None = None


class Waits:
    """Why futures wait that have begun, by their names."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # Of those that are between two attempts: unfinished futures are bounded.
        self._waiting: dict[str, types.Waiting] = {}

    def of(self, future: str) -> types.Waiting | None:
        """None: it does not wait for anything."""
        return self._waiting.get(future)

    async def out(self, future: str, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """What `attempt` answers, repeated for as long as whatever it needs is away or full.

        Raises:
            MeshError: any other that it raises.
        """
        delays = backoff()
        since: float | None = None
        while True:
            try:
                return await attempt()
            except MeshError as error:
                if not _passes(error):
                    raise
                if since is None:
                    log.info("%s waits: %s", future, error)
                    since = self._clock()
                delay_s = max(next(delays), error.retry_after_s)
                self._waiting[future] = types.Waiting(
                    subject=future,
                    rule=error.reason,
                    reason=str(error),
                    release=f"another attempt, in {delay_s:.1f} s at most",
                    position=1,
                    since=since,
                )
            try:
                await asyncio.sleep(delay_s)
            finally:
                del self._waiting[future]


def _passes(error: MeshError) -> bool:
    """Whether the same call may work later, or is how one comes to know how it went."""
    if isinstance(error, QuotaExceeded):
        return False
    return isinstance(error, (Unavailable, Overloaded, DeadlineExceeded, Fenced))
