"""A published version as a stream: from its trainer, or from the blob store."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from rollmesh.errors import DigestMismatch, NotFound, Unavailable
from rollmesh.exports import StoredExport

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from rollmesh import types
    from rollmesh.blobs import Blobs
    from services.coordinator.ports import TrainerPort

CHUNK_BYTES = 2**20


async def export(
    name: str, version: types.PublishedVersion, trainer: TrainerPort, address: str, blobs: Blobs
) -> AsyncGenerator[types.AdapterExport | bytes | str]:
    """As its trainer streams it or, once it keeps it no longer, as it wrote it to `blobs`.

    Raises:
        NotFound: neither has it.
        Unavailable: the stream was torn.
        DigestMismatch: it is something else than was published.
    """
    digest, begun = "", False
    exported = trainer.export_adapter(name, version.policy_version)
    try:
        async with contextlib.aclosing(exported) as parts:
            async for part in parts:
                if isinstance(part, str):
                    digest = part
                    _check(name, version, digest, address)
                begun = True
                yield part
    except NotFound:
        if begun or not version.export_key:
            raise
        async for part in _stored(name, version, blobs):
            yield part
        return
    if not digest:
        raise Unavailable(f"the trainer at {address} stopped in the middle of {name}")


async def _stored(
    name: str, version: types.PublishedVersion, blobs: Blobs
) -> AsyncGenerator[types.AdapterExport | bytes | str]:
    key = version.export_key
    stored = await asyncio.to_thread(StoredExport, blobs, key)
    _check(name, version, stored.digest, key)
    yield stored.export
    for start in range(0, stored.export.num_bytes, CHUNK_BYTES):
        yield await asyncio.to_thread(stored.read, start, CHUNK_BYTES)
    yield stored.digest


def _check(name: str, version: types.PublishedVersion, digest: str, source: str) -> None:
    if digest != version.digest:
        raise DigestMismatch(
            f"version {version.policy_version} of {name} was published as {version.digest}, "
            f"and {source} sent {digest}",
            resource=name,
        )
