"""Records: small documents of projects, each with a revision that who writes it may insist on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, func, insert, or_, select, tuple_, update

from rollmesh import types
from rollmesh.errors import Conflict, NotFound, Overloaded
from rollmesh.names import project_name
from services.coordinator.store.database import serialize
from services.coordinator.store.tables import records

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.coordinator.store.database import Database

MAX_EXPIRED = 256
"""Records that one transaction deletes because they have expired."""
_AFTER_ALL = "\x7f"
"""Sorts after whatever a key may hold."""
_KEY = (records.c.project, records.c.key)


class RecordStore:
    """The table `records`. What has expired at the moment `now` is not there any more."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(
        self,
        project: str,
        key: str,
        value: bytes,
        *,
        expected_revision: int | None,
        expire_time: float | None,
        max_records: int,
        now: float,
    ) -> types.Record:
        """Write a record of the project with this id.

        Raises:
            Conflict: its revision is not `expected_revision` (0: there is none; None: whichever).
            Overloaded: it is new, and the project has `max_records`.
        """

        async def work(connection: AsyncConnection) -> types.Record:
            row = await _row_of(connection, project, key)
            old = row if row is not None and _is_kept(row, now) else None
            _check_revision(project, key, old, expected_revision)
            if old is None:
                await _check_room(connection, project, max_records, now)
            new = types.Record(
                key,
                value,
                revision=1 if old is None else old.revision + 1,
                create_time=now if old is None else old.create_time,
                expire_time=expire_time,
            )
            values = {
                "value": value,
                "revision": new.revision,
                "create_time": new.create_time,
                "expire_time": expire_time,
            }
            write = (
                insert(records).values(project=project, key=key)
                if row is None
                else update(records).where(_is(project, key))
            )
            await connection.execute(write.values(values))
            return new

        return await self._database.transact(work)

    async def get(self, project: str, key: str, *, now: float) -> types.Record:
        """One record. NotFound: there is none."""
        query = select(records).where(_is(project, key), _kept(now))
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise NotFound(f"{project_name(project)} has no record {key!r}", resource=key)
        return _record_of(row)

    async def page(
        self,
        project: str,
        prefix: str,
        *,
        limit: int,
        offset: int,
        max_bytes: int,
        newest_first: bool,
        now: float,
    ) -> tuple[list[types.Record], int]:
        """Records whose keys begin with `prefix`, by key or the newest first; how many in all.

        `limit` of them at most, and no more than one if their values have over `max_bytes`.
        """
        mine = (
            records.c.project == project,
            # LIKE would take a small letter for a large one on SQLite, and no index.
            records.c.key >= prefix,
            records.c.key < prefix + _AFTER_ALL,
            _kept(now),
        )
        newest = (records.c.create_time.desc(), records.c.key.desc())
        order = newest if newest_first else (records.c.key,)
        count = select(func.count()).where(*mine)
        # Lengths first: a thousand values may be more than anybody should hold in memory.
        lengths = (
            select(func.length(records.c.value))
            .where(*mine)
            .order_by(*order)
            .limit(limit)
            .offset(offset)
        )
        async with self._database.read() as connection:
            total = (await connection.execute(count)).scalar_one()
            fitting = _fitting(list(await connection.scalars(lengths)), max_bytes)
            query = select(records).where(*mine).order_by(*order).limit(fitting).offset(offset)
            rows = (await connection.execute(query)).all() if fitting else []
        return [_record_of(row) for row in rows], total

    async def delete(
        self, project: str, key: str, *, expected_revision: int | None, now: float
    ) -> None:
        """Delete a record; one that is gone is fine.

        Raises:
            Conflict: its revision is not `expected_revision` (None: whichever).
        """

        async def work(connection: AsyncConnection) -> None:
            row = await _row_of(connection, project, key)
            if row is None:
                return
            if _is_kept(row, now):
                _check_revision(project, key, row, expected_revision)
            await connection.execute(delete(records).where(_is(project, key)))

        await self._database.transact(work)

    async def expire(self, *, now: float) -> int:
        """Delete up to MAX_EXPIRED records that have expired; how many those were."""
        is_expired = records.c.expire_time <= now
        expired = select(*_KEY).where(is_expired).limit(MAX_EXPIRED)

        async def work(connection: AsyncConnection) -> int:
            # Not what is written anew meanwhile.
            gone = delete(records).where(tuple_(*_KEY).in_(expired), is_expired)
            return (await connection.execute(gone)).rowcount

        return await self._database.transact(work)


async def _check_room(
    connection: AsyncConnection, project: str, max_records: int, now: float
) -> None:
    # Whoever counts sees what all others have inserted, and nobody inserts until this has ended.
    await serialize(connection, f"records {project}")
    # Those that have expired count at first: so an index answers, without reading any record.
    everything = select(func.count()).where(records.c.project == project)
    if (await connection.execute(everything)).scalar_one() < max_records:
        return
    if (await connection.execute(everything.where(_kept(now)))).scalar_one() >= max_records:
        name = project_name(project)
        raise Overloaded(
            f"{name} has {max_records} records, which is max_records",
            resource=name,
            allowed=max_records,
        )


def _check_revision(project: str, key: str, row: Row[Any] | None, expected: int | None) -> None:
    revision = 0 if row is None else row.revision
    if expected not in {None, revision}:
        found = f"has revision {revision}" if revision else "is not there"
        raise Conflict(
            f"record {key!r} of {project_name(project)} {found}, and expected was "
            f"{f'revision {expected}' if expected else 'none'}: somebody else has changed it",
            resource=key,
            revision=revision,
        )


def _fitting(lengths: list[int], max_bytes: int) -> int:
    """How many from the first on have `max_bytes` together; one in any case, if there is one."""
    taken = 0
    for number, length in enumerate(lengths):
        taken += length
        if number and taken > max_bytes:
            return number
    return len(lengths)


async def _row_of(connection: AsyncConnection, project: str, key: str) -> Row[Any] | None:
    """All but the value; nobody else writes it until the transaction has ended."""
    columns = [records.c.revision, records.c.create_time, records.c.expire_time]
    query = select(*columns).where(_is(project, key)).with_for_update()
    return (await connection.execute(query)).one_or_none()


def _is(project: str, key: str) -> ColumnElement[bool]:
    return (records.c.project == project) & (records.c.key == key)


def _kept(now: float) -> ColumnElement[bool]:
    return or_(records.c.expire_time.is_(None), records.c.expire_time > now)


def _is_kept(row: Row[Any], now: float) -> bool:
    return row.expire_time is None or row.expire_time > now


def _record_of(row: Row[Any]) -> types.Record:
    return types.Record(row.key, row.value, row.revision, row.create_time, row.expire_time)
