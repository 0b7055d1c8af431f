"""Leases: holds on versions, for a time that their holders renew; a job's until it has ended."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, func, insert, select, update

from rollmesh import types
from rollmesh.errors import NotFound, Overloaded
from rollmesh.names import lease_name, parse_job, parse_lease
from services.coordinator.store import requests
from services.coordinator.store.adapter_rows import is_open, kept_version, row_of
from services.coordinator.store.database import serialize
from services.coordinator.store.tables import adapters, leases, versions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.coordinator.store.database import Database
    from services.coordinator.store.requests import Request

MAX_EXPIRED = 256
"""Leases that one transaction forgets."""


class LeaseStore:
    """The table `leases`. What has expired at the moment `now` is not there any more.

    An adapter was in use for as long as a version of it was leased: its use_time says so once the
    lease is gone.
    """

    def __init__(self, database: Database, request_retention_s: float) -> None:
        self._database = database
        self._request_retention_s = request_retention_s

    async def create(
        self,
        name: str,
        adapter: str,
        policy_version: int | None,
        *,
        expire_time: float,
        max_leases: int,
        request: Request | None,
        now: float,
    ) -> types.Lease:
        """A new lease on a version (None: the newest), or the one that `request` made before.

        Raises:
            NotFound: no such adapter, or version that is kept; or what `request` made is gone.
            AlreadyExists: the request_id is taken.
            Overloaded: the project has `max_leases`.
        """
        project, _ = parse_lease(name)

        async def work(connection: AsyncConnection) -> types.Lease:
            # Before the adapter's row, as all do: else two would wait in a ring.
            await serialize(connection, f"leases {project}")
            if request is not None:
                made = await requests.find(connection, request)
                if made is not None:
                    return _lease_of(await _row_of(connection, made, now))
            row = await row_of(connection, adapter, lock=True)
            version = await kept_version(connection, row, policy_version)
            count = select(func.count()).where(leases.c.project == project, is_open(now))
            if (await connection.execute(count)).scalar_one() >= max_leases:
                raise Overloaded(
                    f"projects/{project} has {max_leases} leases, which is max_leases",
                    resource=f"projects/{project}",
                    allowed=max_leases,
                )
            await connection.execute(
                insert(leases).values(
                    name=name,
                    project=project,
                    adapter=adapter,
                    policy_version=version.policy_version,
                    expire_time=expire_time,
                )
            )
            if request is not None:
                await requests.remember(
                    connection, request, name, now=now, retention_s=self._request_retention_s
                )
            return types.Lease(name, adapter, version.policy_version, version.digest, expire_time)

        return await self._database.transact(work)

    async def renew(self, name: str, *, expire_time: float, now: float) -> types.Lease:
        """Let a lease end at `expire_time`. NotFound: it has expired, or was deleted."""

        async def work(connection: AsyncConnection) -> types.Lease:
            row = await _row_of(connection, name, now)
            # Its version may be let go of from the moment on when the lease has expired.
            await row_of(connection, row.adapter, lock=True)
            changed = await connection.execute(
                update(leases).where(leases.c.name == name).values(expire_time=expire_time)
            )
            if not changed.rowcount:
                raise _missing(name)
            return _lease_of(await _row_of(connection, name, now))

        return await self._database.transact(work)

    async def delete(self, name: str, *, now: float) -> None:
        """End a lease; one that is gone is fine."""
        await self._database.transact(partial(_end, name=name, now=now))

    async def expire(self, *, now: float) -> int:
        """Forget up to MAX_EXPIRED leases that have expired; how many those are."""
        expired = select(leases).where(~is_open(now)).limit(MAX_EXPIRED)
        async with self._database.read() as connection:
            rows = (await connection.execute(expired)).all()
        if not rows:
            return 0
        names = [row.name for row in rows]

        async def work(connection: AsyncConnection) -> int:
            await _end_use(connection, rows, now)
            # Not what was renewed meanwhile.
            gone = delete(leases).where(leases.c.name.in_(names), ~is_open(now))
            return (await connection.execute(gone)).rowcount

        return await self._database.transact(work)


async def hold_for_job(
    connection: AsyncConnection, job: str, adapter: str, policy_version: int | None
) -> tuple[str, types.PublishedVersion]:
    """Keep a version (None: the newest) until `release_of_job`; its base model, and which it is.

    It counts among the project's leases, but none is too many: a job is not refused for what its
    users hold.

    Raises:
        NotFound: no such adapter, or version that is kept.
    """
    row = await row_of(connection, adapter, lock=True)
    version = await kept_version(connection, row, policy_version)
    await connection.execute(
        insert(leases).values(
            name=_of_job(job),
            project=parse_job(job)[0],
            adapter=adapter,
            policy_version=version.policy_version,
            expire_time=math.inf,
        )
    )
    return row.base_model, version


async def release_of_job(connection: AsyncConnection, job: str, *, now: float) -> None:
    """The job has ended: what it held, if anything, may go."""
    await _end(connection, name=_of_job(job), now=now)


def _of_job(job: str) -> str:
    # A job's name is never used again, and an id has less room than a name.
    return lease_name(parse_job(job)[0], f"job-{hashlib.sha256(job.encode()).hexdigest()[:32]}")


async def _end(connection: AsyncConnection, *, name: str, now: float) -> None:
    found = await connection.execute(select(leases).where(leases.c.name == name))
    row = found.one_or_none()
    if row is not None:
        await _end_use(connection, [row], now)
        await connection.execute(delete(leases).where(leases.c.name == name))


async def _end_use(connection: AsyncConnection, rows: Sequence[Row[Any]], now: float) -> None:
    """Note that the adapters of leases were used, and lock them.

    Nobody changes leases without the lock of their adapter, and who locks several adapters does so
    in the order of their names: so nobody waits for anybody who waits for him.
    """
    used: dict[str, float] = {}
    for row in rows:
        used[row.adapter] = max(used.get(row.adapter, 0.0), min(row.expire_time, now))
    await connection.execute(
        select(adapters.c.name)
        .where(adapters.c.name.in_(used))
        .order_by(adapters.c.name)
        .with_for_update()
    )
    for adapter, use_time in sorted(used.items()):
        await connection.execute(
            update(adapters)
            .where(adapters.c.name == adapter, adapters.c.use_time < use_time)
            .values(use_time=use_time)
        )


async def _row_of(connection: AsyncConnection, name: str, now: float) -> Row[Any]:
    found = await connection.execute(
        select(leases, versions.c.digest).join(versions).where(leases.c.name == name, is_open(now))
    )
    row = found.one_or_none()
    if row is None:
        raise _missing(name)
    return row


def _lease_of(row: Row[Any]) -> types.Lease:
    return types.Lease(row.name, row.adapter, row.policy_version, row.digest, row.expire_time)


def _missing(name: str) -> NotFound:
    return NotFound(f"there is no {name}: it has expired, or was deleted", resource=name)
