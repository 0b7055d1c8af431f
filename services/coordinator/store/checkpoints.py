"""Checkpoints: adapters kept as they were, each of them a snapshot in the blob store.

A checkpoint's row comes before its snapshot, which reserves the name. One that nobody came back to
complete is free for any other request, and goes after a while.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, insert, or_, select, update

from rollmesh import types
from rollmesh.errors import AlreadyExists, NotFound
from rollmesh.names import adapter_name, checkpoint_name, parse_checkpoint
from services.coordinator.store import requests
from services.coordinator.store.adapter_rows import lora_to_json, missing, row_of
from services.coordinator.store.tables import checkpoints

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.coordinator.store.database import Database
    from services.coordinator.store.requests import Request


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint, and where its state lies."""

    checkpoint: types.Checkpoint
    snapshot: types.Snapshot


class CheckpointStore:
    """The table `checkpoints`. What has expired at the moment `now` is not there any more."""

    def __init__(self, database: Database, request_retention_s: float) -> None:
        self._database = database
        self._request_retention_s = request_retention_s

    async def reserve(self, name: str, *, request: Request, now: float) -> StoredCheckpoint | None:
        """Take a name for a checkpoint of an adapter that exists; or what `request` made before.

        The caller keeps two requests for one name apart: whatever this finds reserved was given up.

        Raises:
            NotFound: there is no such adapter; or what the request made is gone.
            AlreadyExists: the name or the request_id is taken.
        """
        project, adapter, _ = parse_checkpoint(name)

        async def work(connection: AsyncConnection) -> StoredCheckpoint | None:
            row = await _row_of(connection, name, now)
            if await requests.find(connection, request) is not None:
                if row is None:
                    raise _missing(name)
                return _stored_of(row) if row.snapshot else None
            if row is not None and row.snapshot:
                raise AlreadyExists(f"there is a {name} already", resource=name)
            source = await row_of(connection, adapter_name(project, adapter))
            if not source.ready:
                raise missing(source.name)
            # What else has the name was given up or has expired, and so have its requests.
            await connection.execute(delete(checkpoints).where(checkpoints.c.name == name))
            await requests.forget(connection, name)
            await connection.execute(
                insert(checkpoints).values(
                    name=name,
                    project=project,
                    adapter=source.name,
                    base_model=source.base_model,
                    lora=source.lora,
                    create_time=now,
                )
            )
            await requests.remember(
                connection, request, name, now=now, retention_s=self._request_retention_s
            )
            return None

        return await self._database.transact(work)

    async def complete(
        self,
        name: str,
        adapter: types.Adapter,
        snapshot: types.Snapshot,
        *,
        now: float,
        expire_time: float | None,
    ) -> StoredCheckpoint:
        """The snapshot of `adapter` is durable: from now on the checkpoint exists.

        Raises:
            NotFound: it took so long that the reservation is gone.
        """

        async def work(connection: AsyncConnection) -> StoredCheckpoint:
            await connection.execute(
                update(checkpoints)
                .where(checkpoints.c.name == name)
                .values(
                    base_model=adapter.base_model,
                    lora=lora_to_json(adapter.lora),
                    snapshot=json.dumps(dataclasses.asdict(snapshot)),
                    create_time=now,
                    expire_time=expire_time,
                )
            )
            row = await _row_of(connection, name, now)
            if row is None:
                raise _missing(name)
            return _stored_of(row)

        return await self._database.transact(work)

    async def get(self, name: str, *, now: float) -> StoredCheckpoint:
        """One checkpoint. NotFound: no such checkpoint, or it has expired."""
        async with self._database.read() as connection:
            row = await _row_of(connection, name, now)
        if row is None or not row.snapshot:
            raise _missing(name)
        return _stored_of(row)

    async def page(
        self, adapter: str, *, limit: int, after: str, now: float
    ) -> list[types.Checkpoint]:
        """Checkpoints of an adapter by name, from the one behind the id `after` ("": all)."""
        query = (
            select(checkpoints)
            .where(checkpoints.c.adapter == adapter, checkpoints.c.snapshot.is_not(None))
            .where(_alive(now), checkpoints.c.name > checkpoint_name(adapter, after))
            .order_by(checkpoints.c.name)
            .limit(limit)
        )
        async with self._database.read() as connection:
            return [_stored_of(row).checkpoint for row in await connection.execute(query)]

    async def delete(self, name: str, request: Request, *, now: float) -> None:
        """Forget a checkpoint; again, if `request` did. NotFound: there is none."""

        async def work(connection: AsyncConnection) -> None:
            if await requests.find(connection, request) is not None:
                return
            row = await _row_of(connection, name, now)
            if row is None or not row.snapshot:
                raise _missing(name)
            await connection.execute(delete(checkpoints).where(checkpoints.c.name == name))
            await requests.remember(
                connection, request, "", now=now, retention_s=self._request_retention_s
            )

        await self._database.transact(work)

    async def delete_expired(self, *, now: float, reserved_before: float) -> list[str]:
        """Forget what has expired, and what was reserved before that time and came to nothing.

        Answers the names of what has expired. What was reserved its request may make anew.
        """
        names = select(checkpoints.c.name)
        vain = checkpoints.c.snapshot.is_(None) & (checkpoints.c.create_time < reserved_before)

        async def work(connection: AsyncConnection) -> list[str]:
            expired = await connection.scalars(names.where(checkpoints.c.expire_time <= now))
            answer = list(expired)
            for name in list(await connection.scalars(names.where(vain))):
                await requests.forget(connection, name)
                await connection.execute(delete(checkpoints).where(checkpoints.c.name == name))
            await connection.execute(delete(checkpoints).where(checkpoints.c.expire_time <= now))
            return answer

        return await self._database.transact(work)


async def _row_of(connection: AsyncConnection, name: str, now: float) -> Row[Any] | None:
    query = select(checkpoints).where(checkpoints.c.name == name, _alive(now))
    return (await connection.execute(query)).one_or_none()


def _alive(now: float) -> ColumnElement[bool]:
    return or_(checkpoints.c.expire_time.is_(None), checkpoints.c.expire_time > now)


def _stored_of(row: Row[Any]) -> StoredCheckpoint:
    lora = json.loads(row.lora)
    lora["target_modules"] = tuple(lora["target_modules"])
    snapshot = types.Snapshot(**json.loads(row.snapshot))
    return StoredCheckpoint(
        types.Checkpoint(
            name=row.name,
            base_model=row.base_model,
            lora=types.LoraConfig(**lora),
            policy_version=snapshot.policy_version,
            digest=snapshot.weights_digest,
            num_bytes=snapshot.num_bytes,
            create_time=row.create_time,
            expire_time=row.expire_time,
        ),
        snapshot,
    )


def _missing(name: str) -> NotFound:
    return NotFound(f"there is no {name}", resource=name)
