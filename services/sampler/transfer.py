"""How a version gets here: from its trainer, and from the blob store while the trainer is away.

A transfer that breaks off goes on from the bytes that are here. One that brings something else
than was asked for is thrown away, and had once more from each place: bits flip on the way, and a
trainer that was restarted may have been in the middle of something.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from rollmesh.errors import DigestMismatch, MeshError, NotFound, SourceUnavailable
from rollmesh.exports import StoredExport, check_export_key
from services.sampler.download import Download

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from rollmesh.blobs import Blobs
    from rollmesh.types import AdapterExport, AdapterSource
    from services.sampler.download import Part, Parts, Transfer

T = TypeVar("T")

STALL_S = 5.0
"""A transfer that brings nothing for so long has broken off."""
PAUSES_S = (0.0, 0.1, 0.3, 1.0)
"""Before each round in which every place that may still have the version is asked for it."""
_PIECE_BYTES = 4 * 1024 * 1024
_NUM_THREADS = 4
"""Threads of their own: a blob store that hangs must not hold up everything else."""


class Sources:
    """The places that versions come from.

    Args:
        trainer_parts: the parts of a version from its trainer, bytes from an offset on.
        blobs: the mesh's blob store; None: there are only the trainers.
    """

    def __init__(
        self,
        trainer_parts: Parts,
        blobs: Blobs | None,
        *,
        stall_s: float = STALL_S,
        pauses_s: Sequence[float] = PAUSES_S,
    ) -> None:
        self._trainer_parts = trainer_parts
        self._blobs = blobs
        self._stall_s = stall_s
        self._pauses_s = pauses_s
        self._free_threads = asyncio.Semaphore(_NUM_THREADS)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="sampler-blobs")

    async def pull(
        self, source: AdapterSource, admit: Callable[[AdapterExport], Awaitable[None]]
    ) -> Transfer:
        """All of a version whose tensors have the digest of `source`.

        `admit` raises what ends the transfer, or returns when there is room for a version with this
        header. It is asked again where another place has another header.

        Raises:
            InvalidRequest: the export_key is none; the trainer refuses the name.
            SourceUnavailable: a place that may have it does not answer.
            DigestMismatch: what came, from every place that has something, is something else.
            NotFound: no place has it.
        """
        if source.export_key:
            check_export_key(source.export_key, field="source.export_key")
        downloads = [
            Download(place, parts, source, admit, self._stall_s)
            for place, parts in self._places(source)
        ]
        if not downloads:
            raise NotFound(
                "a source without trainer_address; this sampler has no blob store",
                resource=source.adapter,
            )
        for pause_s in self._pauses_s:
            await asyncio.sleep(pause_s)
            for download in downloads:
                if not download.given_up and (transfer := await download.run()) is not None:
                    return transfer
            if all(download.given_up for download in downloads):
                break
        raise _combined(source, [download.error for download in downloads])

    def _places(self, source: AdapterSource) -> list[tuple[str, Parts]]:
        places = []
        if source.trainer_address:
            places.append((f"trainer {source.trainer_address}", self._trainer_parts))
        if self._blobs is not None and source.export_key:
            places.append((f"blob {source.export_key}", self._blob_parts))
        return places

    async def _blob_parts(self, source: AdapterSource, offset: int) -> AsyncGenerator[Part, None]:
        assert self._blobs is not None  # noqa: S101 - else it is no place
        stored = await self._in_thread(StoredExport, self._blobs, source.export_key)
        yield stored.export
        for start in range(offset, stored.export.num_bytes, _PIECE_BYTES):
            size = min(_PIECE_BYTES, stored.export.num_bytes - start)
            yield await self._in_thread(stored.read, start, size)
        yield stored.digest

    async def _in_thread(self, call: Callable[..., T], *args: object) -> T:
        """What `call` returns, once a thread is free; one that hangs keeps its thread."""
        await self._free_threads.acquire()
        running = asyncio.get_running_loop().run_in_executor(self._threads, call, *args)
        running.add_done_callback(self._thread_is_free)
        return await asyncio.shield(running)

    def _thread_is_free(self, running: asyncio.Future[T]) -> None:
        self._free_threads.release()
        running.exception()  # Nobody may be there any more to see it.


def _combined(source: AdapterSource, errors: Sequence[MeshError]) -> MeshError:
    """What to tell of places that all failed: first of all that it may be had later."""
    kind: type[MeshError] = next(
        kind
        for kind in (SourceUnavailable, DigestMismatch, NotFound)
        if any(isinstance(error, kind) for error in errors)
    )
    told = "; ".join(str(error) for error in errors)
    context = next(error.context for error in errors if isinstance(error, kind))
    return kind(f"{source.adapter} version {source.policy_version}: {told}", **context)
