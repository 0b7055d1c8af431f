"""Lets go of what jobs, futures and others leave behind, when it has been kept long enough."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from services.coordinator.store import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.coordinator.store import EventStore, FutureStore, GroupStore, RecordStore

LOOK_EVERY_S = 60.0

log = logging.getLogger(__name__)


class Pruning:
    """Looks every LOOK_EVERY_S seconds.

    Args:
        events: of jobs,
        event_retention_s: and how long they are kept after the job's end.
        groups: that were trained,
        rollout_retention_s: and how long they are kept after that.
        records: of which those go that have expired.
        futures: that are done,
        result_retention_s: and how long their results are kept,
        request_retention_s: and how long it is remembered where their queues are.
        clock: Unix seconds.
    """

    def __init__(
        self,
        events: EventStore,
        groups: GroupStore,
        records: RecordStore,
        futures: FutureStore,
        *,
        event_retention_s: float,
        rollout_retention_s: float,
        result_retention_s: float,
        request_retention_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._events = events
        self._groups = groups
        self._records = records
        self._event_retention_s = event_retention_s
        self._rollout_retention_s = rollout_retention_s
        self._futures = futures
        self._result_retention_s = result_retention_s
        self._request_retention_s = request_retention_s
        self._clock = clock

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                await self.look()
            except StoreUnavailable as error:
                log.warning("what is old is not let go of: %s", error)
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Let go of all that is old now, in small transactions that others come between."""
        now = self._clock()
        while await self._events.drop_of_ended(now - self._event_retention_s):
            pass
        while await self._groups.drop_trained(now - self._rollout_retention_s):
            pass
        while await self._records.expire(now=now):
            pass
        while await self._futures.expire(
            done_before=now - self._result_retention_s,
            forget_before=now - self._request_retention_s,
        ):
            pass
