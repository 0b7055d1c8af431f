"""Records of projects: small documents of services that keep nothing themselves."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rollmesh.errors import InvalidRequest
from rollmesh.names import parse_project
from services.coordinator.paging import page_size_of
from services.coordinator.time_to_live import check_ttl

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh import types
    from services.coordinator.store import RecordStore

MAX_VALUE_BYTES = 256 * 1024
MAX_PAGE_BYTES = 16 * 2**20
"""Of the values of one page, unless it has but one: a message has room for four times as many."""
_MAX_KEY = 240
_KEY = re.compile(rf"[!-~]{{1,{_MAX_KEY}}}")
_PREFIX = re.compile(rf"[!-~]{{0,{_MAX_KEY}}}")


class Records:
    """The records of all projects. No project sees another's.

    Args:
        store: where they are.
        max_records: of one project at once.
        clock: Unix seconds.
    """

    def __init__(self, store: RecordStore, *, max_records: int, clock: Callable[[], float]) -> None:
        self._store = store
        self._max_records = max_records
        self._clock = clock

    async def put(
        self,
        project: str,
        key: str,
        value: bytes,
        *,
        expected_revision: int | None,
        ttl_s: float | None,
    ) -> types.Record:
        """Write a record of `project` (a resource name), for `ttl_s` seconds (None: for ever).

        Raises:
            InvalidRequest: the parameter is the field.
            Conflict: its revision is not `expected_revision` (0: there is none; None: whichever).
            Overloaded: it is new, and the project has as many as it may.
        """
        owner = parse_project(project, field="project")
        _check_key(key)
        _check_revision(expected_revision, least=0)
        check_ttl(ttl_s, field="ttl")
        if len(value) > MAX_VALUE_BYTES:
            raise InvalidRequest(
                f"value: {len(value)} bytes are more than {MAX_VALUE_BYTES}",
                field="value",
                value=f"{len(value)} bytes",
                allowed=f"at most {MAX_VALUE_BYTES} bytes",
            )
        now = self._clock()
        return await self._store.put(
            owner,
            key,
            value,
            expected_revision=expected_revision,
            expire_time=None if ttl_s is None else now + ttl_s,
            max_records=self._max_records,
            now=now,
        )

    async def get(self, project: str, key: str) -> types.Record:
        """One record. InvalidRequest: project or key; NotFound: there is none."""
        owner = parse_project(project, field="project")
        return await self._store.get(owner, _check_key(key), now=self._clock())

    async def page(
        self, project: str, prefix: str, page_size: int, offset: int, *, newest_first: bool
    ) -> tuple[list[types.Record], int]:
        """Records whose keys begin with `prefix`, by key or the newest first; how many in all.

        InvalidRequest: the parameter is the field.
        """
        owner = parse_project(project, field="project")
        if not _PREFIX.fullmatch(prefix):
            raise _malformed("prefix", prefix, least=0)
        if offset < 0:
            raise InvalidRequest(
                f"offset: {offset} is below 0", field="offset", value=offset, allowed="0 or more"
            )
        return await self._store.page(
            owner,
            prefix,
            limit=page_size_of(page_size),
            offset=offset,
            max_bytes=MAX_PAGE_BYTES,
            newest_first=newest_first,
            now=self._clock(),
        )

    async def delete(self, project: str, key: str, *, expected_revision: int | None) -> None:
        """Delete a record; one that is gone is fine.

        Raises:
            InvalidRequest: the parameter is the field.
            Conflict: its revision is not `expected_revision` (None: whichever).
        """
        owner = parse_project(project, field="project")
        _check_key(key)
        _check_revision(expected_revision, least=1)
        await self._store.delete(owner, key, expected_revision=expected_revision, now=self._clock())


def _check_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise _malformed("key", key, least=1)
    return key


def _malformed(field: str, value: str, *, least: int) -> InvalidRequest:
    allowed = f"{least} to {_MAX_KEY} printable ASCII characters without spaces"
    return InvalidRequest(
        f"{field}: {value!r} is not {allowed}", field=field, value=value, allowed=allowed
    )


def _check_revision(revision: int | None, *, least: int) -> None:
    if revision is not None and revision < least:
        raise InvalidRequest(
            f"expected_revision: {revision} is below {least}",
            field="expected_revision",
            value=revision,
            allowed=f"{least} or more",
        )
