"""What the coordinator must not forget.

Jobs with their events, adapters with the journal of their ops, their versions and the leases on
them, checkpoints, request ids, futures, records and keys.

Every method is one small transaction. SQLite in a file by default, PostgreSQL by its URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.coordinator.store.adapter_rows import Origin, StoredAdapter, check_free
from services.coordinator.store.adapters import AdapterStore
from services.coordinator.store.changes import Changes
from services.coordinator.store.checkpoints import CheckpointStore, StoredCheckpoint
from services.coordinator.store.database import (
    Database,
    Deposed,
    StoreUnavailable,
    check_url,
    serialize,
)
from services.coordinator.store.events import EventStore
from services.coordinator.store.futures import (
    FutureStore,
    StoredFuture,
    future_taken,
    too_many_futures,
)
from services.coordinator.store.groups import GroupStore
from services.coordinator.store.jobs import QUEUE, EventPage, JobStore, QueuedJob, StoredJob
from services.coordinator.store.keys import KeyStore
from services.coordinator.store.leadership import Leader, LeadershipStore
from services.coordinator.store.leases import LeaseStore
from services.coordinator.store.migrate import migrate
from services.coordinator.store.new_jobs import NewJob
from services.coordinator.store.ops import JournaledOp, OpStore, unrecoverable
from services.coordinator.store.records import RecordStore
from services.coordinator.store.references import References
from services.coordinator.store.requests import Request, derived_request_id
from services.coordinator.store.sweeps import SweepStore
from services.coordinator.store.usage import UsageStore
from services.coordinator.store.versions import LetGo, VersionStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = [
    "QUEUE",
    "AdapterStore",
    "Changes",
    "CheckpointStore",
    "Deposed",
    "EventPage",
    "EventStore",
    "FutureStore",
    "GroupStore",
    "JobStore",
    "JournaledOp",
    "KeyStore",
    "Leader",
    "LeadershipStore",
    "LeaseStore",
    "LetGo",
    "NewJob",
    "OpStore",
    "Origin",
    "QueuedJob",
    "RecordStore",
    "References",
    "Request",
    "Store",
    "StoreUnavailable",
    "StoredAdapter",
    "StoredCheckpoint",
    "StoredFuture",
    "StoredJob",
    "SweepStore",
    "UsageStore",
    "VersionStore",
    "check_free",
    "check_url",
    "derived_request_id",
    "future_taken",
    "open_store",
    "too_many_futures",
    "unrecoverable",
]


log = logging.getLogger(__name__)

_AGAIN_S = 1.0


@dataclass(frozen=True)
class Store:
    """An open store, migrated to this build's schema."""

    jobs: JobStore
    adapters: AdapterStore
    versions: VersionStore
    leases: LeaseStore
    ops: OpStore
    checkpoints: CheckpointStore
    references: References
    usage: UsageStore
    sweeps: SweepStore
    groups: GroupStore
    events: EventStore
    records: RecordStore
    keys: KeyStore
    futures: FutureStore
    leadership: LeadershipStore
    # Of Database: writes only under that epoch.
    lead: Callable[[int, Callable[[], None]], None]


@contextlib.asynccontextmanager
async def open_store(
    url: str,
    *,
    request_retention_s: float,
    rollout_retention_s: float = 0.0,
    leader_lease_s: float = 5.0,
) -> AsyncIterator[Store]:
    """The store at `url`, for the length of the block. A database that is away is waited for.

    Raises:
        InvalidRequest: `url` is not that of a database.
        FailedPrecondition: a newer build has made it.
        StoreUnavailable: the file cannot be opened.
    """
    database = Database(url, silence_s=leader_lease_s)
    # On a server a renewal has a connection of its own, for which it never waits. In a file it has
    # its turn, as writers do there.
    renewing = Database(url, silence_s=leader_lease_s) if database.is_server else database
    try:
        await _migrated(database)
        changes = Changes()
        yield Store(
            JobStore(database, changes, request_retention_s, rollout_retention_s),
            AdapterStore(database, request_retention_s),
            VersionStore(database),
            LeaseStore(database, request_retention_s),
            OpStore(database),
            CheckpointStore(database, request_retention_s),
            References(database),
            UsageStore(database),
            SweepStore(database, changes, request_retention_s),
            GroupStore(database),
            EventStore(database),
            RecordStore(database),
            KeyStore(database),
            FutureStore(database),
            LeadershipStore(renewing),
            database.lead,
        )
    finally:
        await renewing.close()
        await database.close()


async def _migrated(database: Database) -> None:
    said = ""
    while True:
        try:
            return await database.transact(_migrate_alone)
        except StoreUnavailable as error:
            # A file that is not there now will not come by itself.
            if not (database.is_server or error.is_locked):
                raise
            if str(error) != said:
                said = str(error)
                log.warning("waits for the database: %s", error)
            await asyncio.sleep(_AGAIN_S)


async def _migrate_alone(connection: AsyncConnection) -> None:
    await serialize(connection, "migrate")
    await migrate(connection)
