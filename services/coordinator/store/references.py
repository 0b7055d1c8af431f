"""What the rows refer to and what they no longer need, for the sweeper."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sqlalchemy import exists, select

from services.coordinator.store.adapter_rows import SELECT, is_open, stored_of
from services.coordinator.store.tables import (
    adapters,
    checkpoints,
    futures,
    leases,
    ops,
    versions,
)

if TYPE_CHECKING:
    from services.coordinator.store.database import Database


class References:
    """Reads across all tables."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def blob_keys(self) -> set[str]:
        """Keys of blobs, and of folders of blobs, that some row refers to."""
        keys: set[str] = set()
        async with self._database.read() as connection:
            for column in (adapters.c.snapshot, checkpoints.c.snapshot):
                found = await connection.scalars(select(column).where(column.is_not(None)))
                keys.update(json.loads(snapshot)["key"] for snapshot in found)
            # Recovery begins with the newer of the two.
            origins = await connection.scalars(
                select(adapters.c.origin).where(
                    adapters.c.origin.is_not(None), adapters.c.snapshot.is_(None)
                )
            )
            keys.update(json.loads(origin)["snapshot"]["key"] for origin in origins)
            columns = (ops.c.body_key, ops.c.result_key, ops.c.snapshot_key)
            for column in (*columns, futures.c.body_key, futures.c.result_key):
                keys.update(await connection.scalars(select(column).where(column.is_not(None))))
            exports = select(versions.c.export_key).where(versions.c.export_key != "")
            keys.update(await connection.scalars(exports))
        return keys

    async def idle_adapters(self, *, used_before: float, now: float) -> list[str]:
        """Adapters last used their time to live and longer before that time, and free of jobs.

        A lease that is open at the moment `now` is use.
        """
        query = (
            SELECT.where(adapters.c.ready.is_(True))
            .where(adapters.c.use_time + adapters.c.idle_ttl_s <= used_before)
            .where(~exists().where(leases.c.adapter == adapters.c.name, is_open(now)))
            .order_by(adapters.c.name)
        )
        async with self._database.read() as connection:
            found = [stored_of(row) for row in await connection.execute(query)]
        return [stored.adapter.name for stored in found if not stored.owned]
