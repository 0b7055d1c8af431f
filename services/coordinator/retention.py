"""Lets go of versions that nobody needs, and has the samplers unload them.

A request that found a version just before is still served: its blob is left for a while, and a
sampler unloads nothing that a request uses.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING

from rollmesh.errors import MeshError
from services.coordinator.store import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rollmesh.blobs import Blobs
    from services.coordinator.ports import Sampling
    from services.coordinator.store import LeaseStore, LetGo, VersionStore

LOOK_EVERY_S = 5.0
UNLOAD_S = 5.0
"""For the samplers to hear of what was let go of at one look. One that hears nothing loses nothing:
what it holds nobody asks for, and goes when its place is needed."""
NUM_AT_ONCE = 8
"""Versions that samplers are told of at once."""
SURPLUS_GRACE_S = 60.0
"""How long the blob of a version is left that went because there were too many: well over the time
from finding its row to the end of a pull. The sweeper's own grace covers blobs whose rows are still
to come, and a superseded version gets no other row."""
MAX_SURPLUS = 4096
"""Blobs that are remembered until then; further ones are left to the sweeper."""

log = logging.getLogger(__name__)


class Retention:
    """Looks every LOOK_EVERY_S seconds.

    Args:
        versions: of which some are needed no longer.
        leases: what holds some of them.
        sampling: what unloads them.
        blobs: where they lie.
        retention_s: how long a superseded version stays,
        max_superseded: unless it is not among so many of its adapter.
        clock: Unix seconds.
    """

    def __init__(
        self,
        versions: VersionStore,
        leases: LeaseStore,
        sampling: Sampling,
        blobs: Blobs,
        *,
        retention_s: float,
        max_superseded: int,
        clock: Callable[[], float],
    ) -> None:
        self._versions = versions
        self._leases = leases
        self._sampling = sampling
        self._blobs = blobs
        self._retention_s = retention_s
        self._max_superseded = max_superseded
        self._clock = clock
        # Blobs with the times from which on they may go. Those of a former life the sweeper finds.
        self._surplus: deque[tuple[float, str]] = deque()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                await self.look()
            except StoreUnavailable as error:
                log.warning("old versions are not let go of: %s", error)
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Let go of all that is not needed now."""
        while await self._leases.expire(now=self._clock()):
            pass
        while gone := await self._let_go():
            log.info("%d versions are let go of", len(gone))
            self._remember(gone)
            await self._unload(gone)
        await self._delete_surplus()

    async def _let_go(self) -> list[LetGo]:
        now = self._clock()
        return await self._versions.let_go(
            superseded_before=now - self._retention_s, max_superseded=self._max_superseded, now=now
        )

    def _remember(self, gone: Sequence[LetGo]) -> None:
        goes_at = self._clock() + SURPLUS_GRACE_S
        keys = [each.surplus_key for each in gone if each.surplus_key]
        self._surplus.extend((goes_at, key) for key in keys[: MAX_SURPLUS - len(self._surplus)])

    async def _delete_surplus(self) -> None:
        now = self._clock()
        due: list[str] = []
        while self._surplus and self._surplus[0][0] <= now:
            due.append(self._surplus.popleft()[1])
        try:
            await asyncio.to_thread(self._delete, due)
        except MeshError as error:
            log.warning("blobs of old versions are left to the sweeper: %s", error)

    def _delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._blobs.delete(key)

    async def _unload(self, gone: Sequence[LetGo]) -> None:
        at_once = asyncio.Semaphore(NUM_AT_ONCE)

        async def unload(each: LetGo) -> None:
            async with at_once:
                await self._sampling.unload(each.base_model, each.adapter, each.policy_version)

        try:
            async with asyncio.timeout(UNLOAD_S), asyncio.TaskGroup() as tasks:
                for each in gone:
                    tasks.create_task(unload(each))
        except TimeoutError:
            log.info("not every sampler has heard which versions were let go of")
