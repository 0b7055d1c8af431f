"""Tokens by project and day, for the quotas of a day: what a restart must not forget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import delete, insert, select, update

from services.coordinator.store.tables import usage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.coordinator.store.database import Database


class UsageStore:
    """The table `usage`. A day is counted from 1970 in UTC; tokens are (of prompts, drawn)."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, tokens: Mapping[tuple[str, int], tuple[int, int]]) -> None:
        """Add tokens by project and day to what is there."""

        async def work(connection: AsyncConnection) -> None:
            for (project, day), (prompt, drawn) in sorted(tokens.items()):
                known = await connection.execute(
                    update(usage)
                    .where(usage.c.project == project, usage.c.day == day)
                    .values(
                        prompt_tokens=usage.c.prompt_tokens + prompt,
                        drawn_tokens=usage.c.drawn_tokens + drawn,
                    )
                )
                if not known.rowcount:
                    await connection.execute(
                        insert(usage).values(
                            project=project, day=day, prompt_tokens=prompt, drawn_tokens=drawn
                        )
                    )

        await self._database.transact(work)

    async def of(self, day: int) -> dict[str, tuple[int, int]]:
        """The tokens of every project that had any on that day."""
        query = select(usage.c.project, usage.c.prompt_tokens, usage.c.drawn_tokens)
        async with self._database.read() as connection:
            rows = await connection.execute(query.where(usage.c.day == day))
            return {project: (prompt, drawn) for project, prompt, drawn in rows}

    async def forget(self, *, before: int) -> None:
        """Drop the days before that one."""

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(delete(usage).where(usage.c.day < before))

        await self._database.transact(work)
