"""Keys: who may act for a project. A secret is never here, only its hash."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, func, insert, select

from rollmesh import types
from rollmesh.errors import NotFound, Overloaded
from rollmesh.names import parse_key, project_name
from services.coordinator.store.database import serialize
from services.coordinator.store.tables import keys

if TYPE_CHECKING:
    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.coordinator.store.database import Database


class KeyStore:
    """The table `keys`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, key: types.Key, secret_hash: str, *, max_keys: int) -> None:
        """Add a key whose name and secret are new. Overloaded: the project has `max_keys`."""
        project, _ = parse_key(key.name)

        async def work(connection: AsyncConnection) -> None:
            await serialize(connection, f"keys {project}")
            count = select(func.count()).where(keys.c.project == project)
            if (await connection.execute(count)).scalar_one() >= max_keys:
                raise Overloaded(
                    f"{project_name(project)} has {max_keys} keys, which is max_keys",
                    resource=project_name(project),
                    allowed=max_keys,
                )
            await connection.execute(
                insert(keys).values(
                    name=key.name,
                    project=project,
                    note=key.note,
                    prefix=key.prefix,
                    hash=secret_hash,
                    create_time=key.create_time,
                )
            )

        await self._database.transact(work)

    async def of_project(self, project: str) -> list[types.Key]:
        """Those of the project with this id, the oldest first."""
        query = (
            select(keys).where(keys.c.project == project).order_by(keys.c.create_time, keys.c.name)
        )
        async with self._database.read() as connection:
            return [_key_of(row) for row in await connection.execute(query)]

    async def delete(self, name: str) -> None:
        """Delete a key. NotFound: there is none."""

        async def work(connection: AsyncConnection) -> None:
            gone = await connection.execute(delete(keys).where(keys.c.name == name))
            if not gone.rowcount:
                raise NotFound(f"there is no {name}", resource=name)

        await self._database.transact(work)

    async def find(self, secret_hash: str) -> types.Key | None:
        """The key whose secret has this hash."""
        query = select(keys).where(keys.c.hash == secret_hash)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return None if row is None else _key_of(row)


def _key_of(row: Row[Any]) -> types.Key:
    return types.Key(row.name, row.note, row.prefix, row.create_time)
