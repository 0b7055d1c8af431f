"""Streams of completions that end early at the border of a chunk.

Because a newer version of their policy goes on with them, or because a request of a higher class
gets their place.
"""

from __future__ import annotations

import asyncio
import contextlib
from types import AsyncGeneratorType
from typing import TYPE_CHECKING, Protocol

from rollmesh.errors import MeshError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

    from rollmesh.types import AdapterSource, CompletionChunk
    from services.coordinator.fleet.membership import Sampler
    from services.coordinator.newest import Newest


class Place:
    """What a request has at a sampler, until it has ended or is asked to give it up."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.preempted = False
        self._notices: set[Callable[[], None]] = set()
        self._stream: AsyncGenerator[CompletionChunk] | None = None
        self._eviction: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def closing(self, stream: AsyncGenerator[CompletionChunk]) -> AsyncIterator[None]:
        """Close `stream`, a call of the sampler, at the end of the block, or at an eviction."""
        self._stream = stream
        try:
            yield
        finally:
            self._stream = None
            if self._eviction:
                await self._eviction
            else:
                await stream.aclose()

    def evict(self) -> asyncio.Task[None] | None:
        """End the call of the sampler, whose reader has stopped reading; None: it leaves itself."""
        if not isinstance(self._stream, AsyncGeneratorType) or self._stream.ag_running:
            return None
        self._eviction = asyncio.create_task(_close(self._stream))
        return self._eviction

    def preempt(self) -> None:
        """Ask for the place back; again is the same."""
        self.preempted = True
        notices, self._notices = self._notices, set()
        for notice in notices:
            notice()

    @contextlib.contextmanager
    def noticing(self, notice: Callable[[], None]) -> Iterator[None]:
        """Call `notice` when the place is asked for while the block runs."""
        self._notices.add(notice)
        try:
            yield
        finally:
            self._notices.discard(notice)


async def _close(stream: AsyncGenerator[CompletionChunk]) -> None:
    # However it ends: what it would still say nobody wants.
    with contextlib.suppress(MeshError):
        await stream.aclose()


class _Sign(Protocol):
    def noticing(self, notice: Callable[[], None]) -> contextlib.AbstractContextManager[None]: ...


async def until_newer(
    chunks: AsyncGenerator[CompletionChunk],
    newest: Newest,
    source: AdapterSource,
    *,
    patience_s: float,
) -> AsyncGenerator[CompletionChunk]:
    """The chunks of `source`, up to the one at whose end a newer version is known.

    Where none comes for `patience_s` after it has become known, no more at once.
    """
    while newest.source.policy_version <= source.policy_version:
        chunk = await _next(chunks, newest, patience_s)
        if chunk is None:
            return
        yield chunk


async def until_preempted(
    chunks: AsyncGenerator[CompletionChunk], place: Place, *, patience_s: float
) -> AsyncGenerator[CompletionChunk]:
    """The chunks up to the one at whose end the place is asked for.

    Where none comes for `patience_s` after that, no more; none at all where nothing had come.
    """
    begun = False
    while not place.preempted:
        chunk = await _next(chunks, place, patience_s if begun else 0.0)
        if chunk is None:
            return
        begun = True
        yield chunk


async def _next(
    chunks: AsyncGenerator[CompletionChunk], sign: _Sign, patience_s: float
) -> CompletionChunk | None:
    clock = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(None) as limit:
            with sign.noticing(lambda: limit.reschedule(clock() + patience_s)):
                return await anext(chunks, None)
    except TimeoutError:
        if limit.expired():
            return None
        raise
