"""Who leads: one row that all coordinators of a database see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import insert, select, update

from services.coordinator.store.tables import leadership

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.coordinator.store.database import Database

_ROW = 1
_SELECT = select(
    leadership.c.holder, leadership.c.epoch, leadership.c.renewals, leadership.c.address
)


@dataclass(frozen=True, slots=True)
class Leader:
    """Who leads, and how often it has said so; holder "": nobody does."""

    holder: str
    epoch: int
    renewals: int
    address: str


class LeadershipStore:
    """The table `leadership`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # In a file all writers take turns.
        self.in_turn = not database.is_server

    async def read(self) -> Leader | None:
        """Who leads; None: nobody ever has."""
        async with self._database.read() as connection:
            row = (await connection.execute(_SELECT)).one_or_none()
            return None if row is None else Leader(*row)

    async def take(self, seen: Leader | None, *, holder: str, address: str) -> int | None:
        """Lead in place of `seen`, under the epoch that is answered.

        None: it has said since that it leads, or somebody else was quicker.
        """
        epoch = 1 if seen is None else seen.epoch + 1
        values = {"holder": holder, "epoch": epoch, "renewals": 0, "address": address}

        async def work(connection: AsyncConnection) -> int | None:
            # Returns when the transactions that read the old epoch have ended.
            row = (await connection.execute(_SELECT.with_for_update())).one_or_none()
            if (None if row is None else Leader(*row)) != seen:
                return None
            if row is None:
                await connection.execute(insert(leadership).values(id=_ROW, **values))
            else:
                await connection.execute(update(leadership).values(**values))
            return epoch

        return await self._database.transact(work)

    async def renew(self, epoch: int) -> bool:
        """Say that who leads under `epoch` still does; whether that is so."""

        async def work(connection: AsyncConnection) -> bool:
            changed = await connection.execute(
                update(leadership)
                .where(leadership.c.epoch == epoch)
                .values(renewals=leadership.c.renewals + 1)
            )
            return bool(changed.rowcount)

        return await self._database.transact(work, urgent=True)

    async def give_up(self, epoch: int) -> None:
        """Who leads under `epoch` writes nothing more: somebody else may lead at once."""

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(
                update(leadership).where(leadership.c.epoch == epoch).values(holder="")
            )

        await self._database.transact(work)
