"""Published versions: which there are, and which of them are let go of.

Whoever publishes, leases or lets go holds the adapter's row locked: of a lease and the letting go
of its version only one comes first, and the other one sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, case, delete, exists, func, insert, or_, select, update

from rollmesh.errors import DigestMismatch
from services.coordinator.store.adapter_rows import (
    is_open,
    kept_version,
    published_of,
    row_of,
    version_of,
)
from services.coordinator.store.tables import adapters, leases, versions

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from rollmesh import types
    from services.coordinator.store.database import Database

MAX_LET_GO = 1024
"""Versions that one call lets go of."""
MAX_DELETED = 64
"""Versions that one transaction lets go of: it keeps all other writers waiting."""


@dataclass(frozen=True, slots=True)
class LetGo:
    """A version that is kept no longer.

    `surplus_key`: of its blob, if it had to go before its time because there were too many.
    """

    base_model: str
    adapter: str
    policy_version: int
    surplus_key: str = ""


class VersionStore:
    """The table `versions`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def publish(
        self, name: str, version: types.PublishedVersion, *, now: float
    ) -> types.PublishedVersion:
        """Note a published version, or where it lies by now if it is known; what is noted.

        Raises:
            DigestMismatch: it was published with another digest. Versions never change.
        """

        async def work(connection: AsyncConnection) -> types.PublishedVersion:
            row = await row_of(connection, name, lock=True)
            known = await version_of(connection, name, version.policy_version)
            if known is not None:
                if known.digest != version.digest:
                    raise DigestMismatch(
                        f"version {version.policy_version} of {name} was published as "
                        f"{known.digest} and its trainer now has {version.digest}",
                        resource=name,
                    )
                await _move(connection, name, known, version.export_key)
                return version
            newest = row.published_version
            is_newest = newest is None or newest < version.policy_version
            await connection.execute(
                insert(versions).values(
                    adapter=name,
                    policy_version=version.policy_version,
                    digest=version.digest,
                    create_time=now,
                    export_key=version.export_key,
                    supersede_time=None if is_newest else now,
                )
            )
            published = {
                "published_version": version.policy_version,
                "published_digest": version.digest,
            }
            await connection.execute(
                update(adapters)
                .where(adapters.c.name == name)
                .values(use_time=now, **(published if is_newest else {}))
            )
            if is_newest:
                await connection.execute(
                    update(versions)
                    .where(versions.c.adapter == name, versions.c.policy_version == newest)
                    .values(supersede_time=now)
                )
            return version

        return await self._database.transact(work)

    async def move(self, name: str, version: types.PublishedVersion) -> None:
        """Note where a version lies after it was published again; one that is gone stays gone."""

        async def work(connection: AsyncConnection) -> None:
            known = await version_of(connection, name, version.policy_version)
            if known is not None:
                await _move(connection, name, known, version.export_key)

        await self._database.transact(work)

    async def get(self, name: str, policy_version: int | None) -> types.PublishedVersion:
        """A version that is kept; None: the newest. NotFound: no such adapter or version."""
        async with self._database.read() as connection:
            return await kept_version(connection, await row_of(connection, name), policy_version)

    async def since(self, name: str, first: int) -> dict[int, types.PublishedVersion]:
        """The versions that are kept from `first` on, by their numbers."""
        query = select(versions).where(
            versions.c.adapter == name, versions.c.policy_version >= first
        )
        async with self._database.read() as connection:
            found = [published_of(row) for row in await connection.execute(query)]
        return {version.policy_version: version for version in found}

    async def let_go(
        self, *, superseded_before: float, max_superseded: int, now: float
    ) -> list[LetGo]:
        """Forget up to MAX_LET_GO versions that nobody needs at the moment `now`; which those are.

        Kept are the newest of each adapter, as many as its trainer has to keep, what is leased, and
        of the rest the newest `max_superseded` that were superseded after `superseded_before`.
        """
        idle = _idle(superseded_before, max_superseded, now).limit(MAX_LET_GO)
        async with self._database.read() as connection:
            found = (await connection.execute(idle)).all()
        gone: list[LetGo] = []
        for adapter, rows in groupby(found, key=attrgetter("adapter")):
            known = {row.policy_version: row for row in rows}
            numbers = list(known)
            for first in range(0, len(numbers), MAX_DELETED):
                deleted = await self._delete(adapter, numbers[first : first + MAX_DELETED], now)
                gone += [_let_go_of(known[number]) for number in deleted]
        return gone

    async def _delete(self, name: str, numbers: list[int], now: float) -> list[int]:
        """Forget those of the versions that nobody has leased meanwhile; which those are.

        A lease is all that can save one: its adapter has only more of newer ones by now.
        """

        async def work(connection: AsyncConnection) -> list[int]:
            await connection.execute(
                select(adapters.c.name).where(adapters.c.name == name).with_for_update()
            )
            gone = await connection.scalars(
                delete(versions)
                .where(versions.c.adapter == name, versions.c.policy_version.in_(numbers))
                .where(~_is_leased(now))
                .returning(versions.c.policy_version)
            )
            return sorted(gone)

        return await self._database.transact(work)


def _is_leased(now: float) -> ColumnElement[bool]:
    return exists().where(
        leases.c.adapter == versions.c.adapter,
        leases.c.policy_version == versions.c.policy_version,
        is_open(now),
    )


def _idle(superseded_before: float, max_superseded: int, now: float) -> Select[Any]:
    """What may go, in the order of adapters and numbers, in one walk over all versions."""
    is_idle = and_(versions.c.supersede_time.is_not(None), ~_is_leased(now))
    adapter, newest_first = versions.c.adapter, versions.c.policy_version.desc()
    ranked = select(
        *versions.c,
        is_idle.label("is_idle"),
        # The how manyth of its adapter, and of those that are idle.
        func.row_number().over(partition_by=adapter, order_by=newest_first).label("rank"),
        func.sum(case((is_idle, 1), else_=0))
        .over(partition_by=adapter, order_by=newest_first)
        .label("idle_rank"),
    ).subquery()
    is_late = ranked.c.supersede_time <= superseded_before
    return (
        select(
            ranked.c.adapter,
            ranked.c.policy_version,
            ranked.c.export_key,
            is_late.label("is_late"),
            adapters.c.base_model,
        )
        .join(adapters, adapters.c.name == ranked.c.adapter)
        .where(ranked.c.is_idle, ranked.c.rank > adapters.c.num_versions)
        .where(or_(is_late, ranked.c.idle_rank > max_superseded))
        .order_by(ranked.c.adapter, ranked.c.policy_version)
    )


def _let_go_of(row: Row[Any]) -> LetGo:
    key = "" if row.is_late else row.export_key
    return LetGo(row.base_model, row.adapter, row.policy_version, key)


async def _move(
    connection: AsyncConnection, name: str, known: types.PublishedVersion, export_key: str
) -> None:
    if export_key and export_key != known.export_key:
        await connection.execute(
            update(versions)
            .where(versions.c.adapter == name, versions.c.policy_version == known.policy_version)
            .values(export_key=export_key)
        )
