"""Bytes of ops and futures: in their rows, or where they are large in the blob store.

A blob is written before the row that refers to it. One whose row did not come to be, or does not
need it any more, is the sweeper's.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh.blobs import Blobs

MAX_ROW_BYTES = 256 * 1024
"""What is larger goes into the blob store."""


class Bodies:
    """Writes and reads them.

    Args:
        blobs: what is larger than MAX_ROW_BYTES.
        folder: of their keys.
        new_id: 32 hexadecimal digits that were never used.
    """

    def __init__(self, blobs: Blobs, folder: str, *, new_id: Callable[[], str]) -> None:
        self._blobs = blobs
        self._folder = folder
        self._new_id = new_id

    async def put(self, body: bytes) -> tuple[bytes | None, str | None]:
        """What a row is to have: the bytes or the key of their blob.

        Raises:
            Unavailable: the blob store is away.
        """
        if len(body) <= MAX_ROW_BYTES:
            return body, None
        key = f"{self._folder}/{self._new_id()}"
        await asyncio.to_thread(self._blobs.write, key, body)
        return None, key

    async def get(self, body: bytes | None, key: str | None) -> bytes:
        """What a row has.

        Raises:
            NotFound: the blob is gone.
            Unavailable: the blob store is away.
        """
        if key is not None:
            return await asyncio.to_thread(self._blobs.read, key)
        assert body is not None  # noqa: S101 - the rows that are asked for have one
        return body
