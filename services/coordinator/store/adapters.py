"""Adapters, and which trainer owns each.

An adapter's row comes before the adapter itself: first the name is reserved, then a trainer is
chosen and written down, then asked, and only when it has the adapter is the row ready. Whatever
dies in between, the row says where a copy may lie.

Who owns an adapter is its row's `trainer`, under its `epoch`. An epoch is never used twice for one
name, also not after the adapter was deleted, or the whole database lost: it is the time, unless
that is not later than the epoch before.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from sqlalchemy import delete, func, select, update

from rollmesh.errors import FailedPrecondition, Fenced
from rollmesh.names import adapter_name
from services.coordinator.store import requests
from services.coordinator.store.adapter_rows import (
    SELECT,
    Origin,
    StoredAdapter,
    check_free,
    claim,
    count,
    is_open,
    lora_to_json,
    reserve,
    row_of,
    stored_of,
    taken,
)
from services.coordinator.store.tables import adapters, jobs, leases, ops

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from rollmesh import types
    from services.coordinator.store.database import Database
    from services.coordinator.store.requests import Request


class AdapterStore:
    """The table `adapters`."""

    def __init__(self, database: Database, request_retention_s: float) -> None:
        self._database = database
        self._request_retention_s = request_retention_s

    async def reserve(
        self,
        name: str,
        base_model: str,
        lora: types.LoraConfig,
        *,
        job: str,
        request: Request | None,
        now: float,
        num_versions: int = 1,
        idle_ttl_s: float | None = None,
        origin: Origin | None = None,
        max_adapters: int | None = None,
    ) -> StoredAdapter:
        """The row of a new adapter, or that which `request` or `job` made before.

        Raises:
            AlreadyExists: the name or the request_id is taken.
            QuotaExceeded: the project has `max_adapters`.
        """

        async def work(connection: AsyncConnection) -> StoredAdapter:
            if request is not None:
                made = await requests.find(connection, request)
                if made is not None:
                    row = await row_of(connection, made, lock=True)
                    await claim(connection, row, max_adapters)
                    return stored_of(row)
            await reserve(
                connection,
                name,
                base_model,
                lora,
                job=job,
                now=now,
                num_versions=num_versions,
                idle_ttl_s=idle_ttl_s,
                origin=origin,
                max_adapters=max_adapters,
            )
            if request is not None:
                await requests.remember(
                    connection, request, name, now=now, retention_s=self._request_retention_s
                )
            return stored_of(await row_of(connection, name))

        return await self._database.transact(work)

    async def give(self, stored: StoredAdapter, trainer: str, *, now: float) -> StoredAdapter:
        """Write down that `trainer` owns the adapter from now on, under a new epoch.

        Raises:
            Fenced: somebody else was quicker, or the adapter is gone.
        """
        name = stored.adapter.name
        epoch = max(stored.epoch + 1, int(now * 1000))

        async def work(connection: AsyncConnection) -> None:
            changed = await connection.execute(
                update(adapters)
                .where(adapters.c.name == name, adapters.c.epoch == stored.epoch)
                .values(trainer=trainer, epoch=epoch)
            )
            if not changed.rowcount:
                raise _fenced(name, stored.epoch)

        await self._database.transact(work)
        return dataclasses.replace(stored, trainer=trainer, epoch=epoch)

    async def confirm(self, name: str, *, job: str, made: types.TrainerAdapter) -> StoredAdapter:
        """The trainer has the adapter: from now on it exists.

        Raises:
            AlreadyExists: the name went to somebody else meanwhile.
            FailedPrecondition: `job` has ended meanwhile.
        """

        async def work(connection: AsyncConnection) -> StoredAdapter:
            row = await row_of(connection, name, lock=True)
            if (row.job or "") != job:
                raise taken(name)
            if job and not stored_of(row).owned:
                raise FailedPrecondition(f"{job} has ended", resource=name, job=job)
            await connection.execute(
                update(adapters)
                .where(adapters.c.name == name)
                .values(
                    ready=True,
                    counts=True,
                    lora=lora_to_json(made.lora),
                    policy_version=made.policy_version,
                    next_sequence=made.next_sequence,
                )
            )
            await connection.execute(update(jobs).where(jobs.c.name == job).values(adapter=name))
            return stored_of(await row_of(connection, name))

        return await self._database.transact(work)

    async def release(self, name: str) -> None:
        """Give up an adapter that no trainer took. A job keeps its reservation."""

        async def work(connection: AsyncConnection) -> None:
            row = await row_of(connection, name, lock=True)
            if row.job is not None:
                await connection.execute(
                    update(adapters).where(adapters.c.name == name).values(trainer="", counts=False)
                )
                return
            await requests.forget(connection, name)
            await connection.execute(delete(adapters).where(adapters.c.name == name))

        await self._database.transact(work)

    async def not_being_made(self, name: str) -> None:
        """What was left half made counts for no quota any more; nothing to do where it is made."""

        async def work(connection: AsyncConnection) -> None:
            unmade = update(adapters).where(adapters.c.name == name, adapters.c.ready.is_(False))
            await connection.execute(unmade.values(counts=False))

        await self._database.transact(work)

    async def none_is_being_made(self) -> None:
        """What a coordinator that ended left half made counts for no quota any more."""

        async def work(connection: AsyncConnection) -> None:
            unmade = update(adapters).where(adapters.c.ready.is_(False), adapters.c.counts)
            await connection.execute(unmade.values(counts=False))

        await self._database.transact(work)

    async def count(self, project: str) -> int:
        """Adapters of a project that are there or are being made."""
        async with self._database.read() as connection:
            return await count(connection, project)

    async def counts(self) -> dict[str, int]:
        """`count` of every project that has any."""
        query = select(adapters.c.project, func.count()).where(adapters.c.counts)
        async with self._database.read() as connection:
            rows = await connection.execute(query.group_by(adapters.c.project))
            return {row.project: row[1] for row in rows}

    async def get(self, name: str) -> StoredAdapter:
        """One adapter, ready or not. NotFound: no such adapter."""
        async with self._database.read() as connection:
            return stored_of(await row_of(connection, name))

    async def page(self, project: str, *, limit: int, after: str) -> list[types.Adapter]:
        """Adapters of a project by name, from the one behind the id `after` ("": all)."""
        query = (
            SELECT.where(adapters.c.project == project, adapters.c.ready.is_(True))
            .where(adapters.c.name > adapter_name(project, after))
            .order_by(adapters.c.name)
            .limit(limit)
        )
        async with self._database.read() as connection:
            return [stored_of(row).adapter for row in await connection.execute(query)]

    async def all(self) -> list[StoredAdapter]:
        """Every adapter of every project, ready or not."""
        async with self._database.read() as connection:
            return [stored_of(row) for row in await connection.execute(SELECT)]

    async def touch(self, name: str, *, now: float) -> None:
        """Note that an adapter was used."""

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(
                update(adapters).where(adapters.c.name == name).values(use_time=now)
            )

        await self._database.transact(work)

    async def keep_idle(self, name: str, idle_ttl_s: float | None, *, now: float) -> None:
        """Set an adapter's time to live, which begins now. NotFound: there is none."""

        async def work(connection: AsyncConnection) -> None:
            row = await row_of(connection, name, lock=True)
            change = update(adapters).where(adapters.c.name == row.name)
            await connection.execute(change.values(idle_ttl_s=idle_ttl_s, use_time=now))

        await self._database.transact(work)

    async def give_up(self, name: str, problem: str) -> None:
        """Write down why an adapter cannot be recovered."""

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(
                update(adapters).where(adapters.c.name == name).values(problem=problem)
            )

        await self._database.transact(work)

    async def keep_snapshot(self, name: str, snapshot: types.Snapshot, *, epoch: int) -> bool:
        """Let recovery begin with `snapshot`, and cut off the bodies of the ops that it contains.

        False, and nothing is changed: it was written by a former owner, or a later one is kept, or
        it contains an op whose result is not recorded, which nobody could then ask the trainer for.
        """

        async def work(connection: AsyncConnection) -> bool:
            stored = stored_of(await row_of(connection, name, lock=True))
            begin = 1 if stored.snapshot is None else stored.snapshot.next_sequence
            end = stored.adapter.next_sequence
            if stored.epoch != epoch or not begin <= snapshot.next_sequence <= end:
                return False
            await connection.execute(
                update(adapters)
                .where(adapters.c.name == name)
                .values(snapshot=json.dumps(dataclasses.asdict(snapshot)), origin=None)
            )
            await connection.execute(
                update(ops)
                .where(
                    ops.c.adapter == name,
                    ops.c.sequence < snapshot.next_sequence,
                    ops.c.body.is_not(None) | ops.c.body_key.is_not(None),
                )
                .values(body=None, body_key=None, snapshot_key=None)
            )
            return True

        return await self._database.transact(work)

    async def delete(
        self, name: str, request: Request | None, *, now: float, unless_leased: bool = False
    ) -> None:
        """Forget an adapter with its versions, the leases on them, and its journal.

        Raises:
            FailedPrecondition: a job that has not ended trains it; with `unless_leased` also that
                somebody has a lease on a version of it.
        """

        async def work(connection: AsyncConnection) -> None:
            stored = stored_of(await row_of(connection, name, lock=True))
            check_free(stored)
            if unless_leased:
                open_leases = select(leases.c.name).where(leases.c.adapter == name, is_open(now))
                if (await connection.scalars(open_leases.limit(1))).first() is not None:
                    raise FailedPrecondition(f"a version of {name} is leased", resource=name)
            await connection.execute(delete(adapters).where(adapters.c.name == name))
            if request is not None:
                await requests.remember(
                    connection, request, "", now=now, retention_s=self._request_retention_s
                )

        await self._database.transact(work)

    async def repeated(self, request: Request) -> bool:
        """Whether `request` was carried out before."""
        async with self._database.read() as connection:
            return await requests.find(connection, request) is not None


def _fenced(name: str, epoch: int) -> Fenced:
    return Fenced(f"{name} is not under epoch {epoch} any more", resource=name)
