"""Keeps what projects used of a day's tokens: a restart must not give them the day anew.

It is written every INTERVAL_S and when the coordinator ends. One that is killed forgets what was
used since it wrote last, so a quota of a day may then be exceeded by the tokens of INTERVAL_S.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rollmesh.errors import MeshError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from services.coordinator.scheduler import Scheduler
    from services.coordinator.store import UsageStore

log = logging.getLogger(__name__)

INTERVAL_S = 5.0
DAYS_KEPT = 90
_DAY_S = 86400


class UsageKeeper:
    """Between the scheduler, which counts, and the store.

    Args:
        store: where it is written.
        scheduler: what counts.
        dispatch: gives places to those who waited for another day.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: UsageStore,
        scheduler: Scheduler,
        *,
        dispatch: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._scheduler = scheduler
        self._dispatch = dispatch
        self._clock = clock
        # What the store did not take: by project and day, tokens of prompts and drawn.
        self._unwritten: dict[tuple[str, int], tuple[int, int]] = {}

    async def restore(self) -> None:
        """Tell the scheduler what was used today before this process began."""
        day = self._today()
        for project, tokens in (await self._store.of(day)).items():
            self._scheduler.restore_usage(project, day, sum(tokens))

    async def run(self) -> None:
        """Write until cancelled, and then once more."""
        day = self._today()
        try:
            while True:
                await asyncio.sleep(INTERVAL_S)
                await self._write()
                if day != self._today():
                    day = self._today()
                    self._dispatch()
                    await self._forget(day - DAYS_KEPT)
        finally:
            await self._write()

    async def _write(self) -> None:
        tokens = dict(self._unwritten)
        for key, (prompt, drawn) in self._scheduler.take_usage().items():
            prompts, drawns = tokens.get(key, (0, 0))
            tokens[key] = prompts + prompt, drawns + drawn
        self._unwritten.clear()
        if not tokens:
            return
        # Nobody could tell whether one that is cancelled in the middle was written.
        writing = asyncio.create_task(self._add(tokens))
        try:
            await asyncio.shield(writing)
        finally:
            await writing

    async def _add(self, tokens: Mapping[tuple[str, int], tuple[int, int]]) -> None:
        try:
            await self._store.add(tokens)
        except MeshError as error:
            log.warning("what was used of quotas is not written yet: %s", error)
            self._unwritten.update(tokens)

    async def _forget(self, day: int) -> None:
        try:
            await self._store.forget(before=day)
        except MeshError as error:
            log.warning("old usage stays for a day: %s", error)

    def _today(self) -> int:
        return int(self._clock() // _DAY_S)
