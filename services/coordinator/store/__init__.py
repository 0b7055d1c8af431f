"""What the coordinator must not forget.

Jobs with their events, adapters with the journal of their ops, their versions and the leases on
them, checkpoints, request ids.

Every method is one small transaction. SQLite in a file by default, PostgreSQL by its URL.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.coordinator.store.adapter_rows import Origin, StoredAdapter, check_free
from services.coordinator.store.adapters import AdapterStore
from services.coordinator.store.changes import Changes
from services.coordinator.store.checkpoints import CheckpointStore, StoredCheckpoint
from services.coordinator.store.database import Database, StoreUnavailable, check_url
from services.coordinator.store.jobs import QUEUE, EventPage, JobStore, QueuedJob, StoredJob
from services.coordinator.store.leases import LeaseStore
from services.coordinator.store.migrate import migrate
from services.coordinator.store.ops import JournaledOp, OpStore, unrecoverable
from services.coordinator.store.references import References
from services.coordinator.store.requests import Request
from services.coordinator.store.versions import LetGo, VersionStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = [
    "QUEUE",
    "AdapterStore",
    "Changes",
    "CheckpointStore",
    "EventPage",
    "JobStore",
    "JournaledOp",
    "LeaseStore",
    "LetGo",
    "OpStore",
    "Origin",
    "QueuedJob",
    "References",
    "Request",
    "Store",
    "StoreUnavailable",
    "StoredAdapter",
    "StoredCheckpoint",
    "StoredJob",
    "VersionStore",
    "check_free",
    "check_url",
    "open_store",
    "unrecoverable",
]


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


@contextlib.asynccontextmanager
async def open_store(url: str, *, request_retention_s: float) -> AsyncIterator[Store]:
    """The store at `url`, for the length of the block."""
    database = Database(url)
    try:
        await database.transact(migrate)
        yield Store(
            JobStore(database, Changes(), request_retention_s),
            AdapterStore(database, request_retention_s),
            VersionStore(database),
            LeaseStore(database, request_retention_s),
            OpStore(database),
            CheckpointStore(database, request_retention_s),
            References(database),
        )
    finally:
        await database.close()
