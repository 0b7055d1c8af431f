"""What the gateway knows of a project, as JSON documents in the coordinator's records.

Keys: sessions/{id}, runs/{model_id}, samplers/{sampling_session_id},
checkpoints/{model_id}/{kind}/{name}, joins/{sampling_session_id} and gateway/secret.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cachetools import TTLCache

from rollmesh.errors import Conflict, NotFound, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh.types import Record
    from services.gateway.ports import Records

Fields = dict[str, Any]

_ATTEMPTS = 8
_CACHED = 10_000
_CACHED_BYTES = 4096
"""Of a document: larger ones, which only users' metadata makes, are read again each time."""
_CACHE_S = 30.0


@dataclass(frozen=True, slots=True)
class Document:
    """A record: what it says, its revision, and when it was made (Unix seconds)."""

    key: str
    fields: Fields
    revision: int
    create_time: float


class Documents:
    """Records as documents. `clock`: seconds, monotonic."""

    def __init__(self, records: Records, clock: Callable[[], float] = time.monotonic) -> None:
        self._records = records
        # What others of this gateway's requests saw a moment ago.
        self._seen: TTLCache[tuple[str, str], Document] = TTLCache(_CACHED, _CACHE_S, timer=clock)

    async def get(self, project: str, key: str) -> Document:
        """As it is now. NotFound: there is none."""
        return self._remember(project, await self._records.get(project, key))

    async def find(self, project: str, key: str) -> Document | None:
        """The same; None: there is none."""
        try:
            return await self.get(project, key)
        except NotFound:
            return None

    async def seen(self, project: str, key: str) -> Document:
        """As it is now or was up to 30 s ago, for what hardly changes. NotFound: there is none."""
        return self._seen.get((project, key)) or await self.get(project, key)

    async def create(
        self, project: str, key: str, fields: Fields, *, ttl_s: float | None = None
    ) -> tuple[Document, bool]:
        """Write it unless there is one: what is there now, and whether it is ours.

        It is kept for `ttl_s` seconds from its last change on; None: until it is deleted.
        """
        for _ in range(_ATTEMPTS):
            try:
                record = await self._records.put(
                    project, key, _bytes(fields), expected_revision=0, ttl_s=ttl_s
                )
            except Conflict:
                found = await self.find(project, key)
                if found is not None:
                    return found, False
            else:
                return self._remember(project, record), True
        raise Unavailable(f"{key} changes all the time", resource=key)

    async def change(
        self,
        project: str,
        key: str,
        change: Callable[[Fields], Fields | None],
        *,
        ttl_s: float | None = None,
    ) -> Document:
        """Replace what is there by `change` of it, None: leave it; again if somebody else did too.

        What has a time to live needs it again.

        Raises:
            NotFound: there is none.
        """
        for _ in range(_ATTEMPTS):
            found = await self.get(project, key)
            fields = change(found.fields)
            if fields is None:
                return found
            try:
                record = await self._records.put(
                    project, key, _bytes(fields), expected_revision=found.revision, ttl_s=ttl_s
                )
            except Conflict:
                continue
            return self._remember(project, record)
        raise Unavailable(f"{key} changes all the time", resource=key)

    async def count(self, project: str, key: str, *, ttl_s: float) -> int:
        """From 1: how often this was called, with no more than `ttl_s` seconds in between."""
        return (await self._records.put(project, key, b"{}", ttl_s=ttl_s)).revision

    async def page(
        self, project: str, prefix: str, *, limit: int = 100, offset: int = 0, newest: bool = True
    ) -> tuple[list[Document], int]:
        """One page, the newest first or by key, and how many there are in all."""
        records, total = await self._records.list(
            project, prefix, page_size=min(max(limit, 1), 1000), offset=offset, newest_first=newest
        )
        return [_document(record) for record in records], total

    async def all(self, project: str, prefix: str, *, most: int = 10_000) -> list[Document]:
        """All of them by key, `most` at most."""
        found: list[Document] = []
        while len(found) < most:
            page, total = await self.page(
                project, prefix, limit=1000, offset=len(found), newest=False
            )
            found += page
            if not page or len(found) >= total:
                break
        return found[:most]

    async def delete(self, project: str, key: str, *, revision: int | None = None) -> None:
        """Delete it; what somebody else has changed since `revision` stays."""
        self._seen.pop((project, key), None)
        try:
            await self._records.delete(project, key, expected_revision=revision)
        except Conflict:
            return

    def _remember(self, project: str, record: Record) -> Document:
        document = _document(record)
        self._seen.pop((project, record.key), None)
        if len(record.value) <= _CACHED_BYTES:
            self._seen[project, record.key] = document
        return document


def _bytes(fields: Fields) -> bytes:
    return json.dumps(fields, allow_nan=False, separators=(",", ":")).encode()


def _document(record: Record) -> Document:
    return Document(record.key, json.loads(record.value), record.revision, record.create_time)
