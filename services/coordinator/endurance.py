"""How long a request goes on when its samplers are lost."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from rollmesh.errors import (
    DigestMismatch,
    InternalError,
    MeshError,
    Overloaded,
    SourceUnavailable,
    Unavailable,
)
from services.coordinator.retry import RETRY_FOR_S, backoff

if TYPE_CHECKING:
    from services.coordinator.ports import Lost

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often in a row an interactive request may be given to a sampler and get nothing, and a job's
meet an internal error: a request that breaks every engine it is given to must not go round for
ever."""

REFUSALS = 10
"""How often in a row samplers may have no room for an interactive request."""


class Unserved(Unavailable):
    """No sampler has served for as long as the request was ready to wait."""


class Endurance(Protocol):
    """Of one request."""

    @property
    def unserved_s(self) -> float | None:
        """How long to wait for a sampler while none serves; None: without end."""
        ...

    async def served(self, problem: str) -> None:
        """Told before the wait for a sampler and during it: why none can be asked, "": one can."""
        ...

    def progressed(self) -> None:
        """Tokens have come."""
        ...

    async def failed(self, error: MeshError) -> None:
        """An attempt ended with `error`: raise it, or return when it is time for the next."""
        ...

    def refused(self, error: Overloaded) -> None:
        """A sampler had no room: raise what it said, or return for another attempt."""
        ...


class Interactive:
    """Gives up after ATTEMPTS in a row without a token, and when nobody serves for RETRY_FOR_S.

    Where nobody serves from the start it says so at once.
    """

    unserved_s = RETRY_FOR_S

    def __init__(self) -> None:
        self._begun = False
        self.progressed()

    async def served(self, problem: str) -> None:
        """Raise Unavailable where there is nobody to begin with."""
        if problem and not self._begun:
            raise Unavailable(problem)
        self._begun = True

    def progressed(self) -> None:
        """Begin to count anew."""
        self._num_failed = self._num_refused = 0
        self._delays = backoff()

    async def failed(self, error: MeshError) -> None:
        """Wait a little, or raise."""
        self._num_failed += 1
        elsewhere = isinstance(error, (Unavailable, InternalError, DigestMismatch))
        if not elsewhere or isinstance(error, Unserved) or self._num_failed == ATTEMPTS:
            raise error
        await asyncio.sleep(next(self._delays))

    def refused(self, error: Overloaded) -> None:
        """Raise when it has been too often in a row."""
        self._num_refused += 1
        if self._num_refused == REFUSALS:
            raise error


class OfJob:
    """Waits until the fleet is well, and says why to `lost`.

    It gives up where no sampler could have the version for RETRY_FOR_S, and after ATTEMPTS internal
    errors in a row without a token.
    """

    unserved_s = None

    def __init__(self, lost: Lost) -> None:
        self._lost = lost
        self._problem = ""
        self.progressed()

    async def served(self, problem: str) -> None:
        """Say so, once for each time that nobody is there."""
        told, self._problem = self._problem, problem
        if problem and problem != told:
            await self._lost(problem)

    def progressed(self) -> None:
        """Begin to count anew."""
        self._problem = ""
        self._num_internal_errors = 0
        self._without_source_since: float | None = None
        self._delays = backoff()

    async def failed(self, error: MeshError) -> None:
        """Wait a little, or raise."""
        match error:
            case SourceUnavailable():
                self._check_source(error)
                await self._lost(str(error))
            case Unavailable():
                self._without_source_since = None
                await self._lost(str(error))
            case Overloaded():
                log.info("a sample request is tried again: %s", error)
            case InternalError() | DigestMismatch():
                self._num_internal_errors += 1
                if self._num_internal_errors == ATTEMPTS:
                    raise error
                await self._lost(str(error))
            case _:
                raise error
        await asyncio.sleep(next(self._delays))

    def refused(self, error: Overloaded) -> None:
        """It keeps its turn for as long as it takes."""

    def _check_source(self, error: SourceUnavailable) -> None:
        now = asyncio.get_running_loop().time()
        if self._without_source_since is None:
            self._without_source_since = now
        if now - self._without_source_since >= RETRY_FOR_S:
            raise SourceUnavailable(
                f"for {RETRY_FOR_S:g} s no sampler could have the policy from its trainer: {error}",
                **error.context,
            ) from error
