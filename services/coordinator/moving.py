"""Completions under way that move to a newer version of their policy."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from rollmesh.types import AdapterSource, CompletionChunk
    from services.coordinator.newest import Newest


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


async def _next(
    chunks: AsyncGenerator[CompletionChunk], newest: Newest, patience_s: float
) -> CompletionChunk | None:
    clock = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(None) as limit:
            with newest.noticing(lambda: limit.reschedule(clock() + patience_s)):
                return await anext(chunks, None)
    except TimeoutError:
        if limit.expired():
            return None
        raise
