"""Lets go of what has outlived its use: expired checkpoints, idle adapters, unreferenced blobs.

A blob is written before the row that refers to it, and whoever found it through a row may read it
after that row is gone. So only what no row referred to at any sweep of GRACE_S is deleted,
and each sweep lists the blobs before it reads the references: a blob that a row came to refer to
in between is then seen as referred to.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rollmesh.errors import FailedPrecondition, MeshError, NotFound
from services.coordinator.time_to_live import USE_NOTED_EVERY_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh.blobs import Blobs
    from services.coordinator.adapters import Adapters
    from services.coordinator.store import CheckpointStore, References

GRACE_S = 900.0
"""How long a blob that no row refers to, and a name that was reserved in vain, are kept: well over
the time from writing a blob to its row, and so short that what the snapshots of busy adapters
supersede does not fill a disk."""
DELETE_TIMEOUT_S = 10.0
"""How long an idle adapter may keep the sweep waiting, by a trainer or calls that hang."""

PREFIXES = ("snapshots", "ops", "versions", "futures")

_log = logging.getLogger(__name__)


class Sweeper:
    """Sweeps every `interval_s` seconds.

    Args:
        references: what is still needed.
        checkpoints: the store of what may expire.
        adapters: what deletes an adapter.
        blobs: where nothing else lies under PREFIXES than what rows of this store refer to.
        clock: Unix seconds.
    """

    def __init__(
        self,
        references: References,
        checkpoints: CheckpointStore,
        adapters: Adapters,
        blobs: Blobs,
        *,
        interval_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._references = references
        self._checkpoints = checkpoints
        self._adapters = adapters
        self._blobs = blobs
        self._interval_s = interval_s
        self._clock = clock
        # Key to the sweep that found it unreferenced first. As many as there are such blobs, which
        # GRACE_S bounds. A restart begins anew: it may keep one for longer, never for less.
        self._unreferenced: dict[str, float] = {}

    async def run(self) -> None:
        """Sweep until cancelled; what cannot be done now is left to the next sweep."""
        while True:
            for task in (self.delete_expired, self.delete_idle, self.sweep_blobs):
                try:
                    await task()
                except MeshError as error:
                    _log.warning("sweep put off: %s", error)
            await asyncio.sleep(self._interval_s)

    async def delete_expired(self) -> None:
        """Delete the rows of checkpoints that have expired."""
        now = self._clock()
        for name in await self._checkpoints.delete_expired(now=now, reserved_before=now - GRACE_S):
            _log.info("%s has expired and is deleted", name)

    async def delete_idle(self) -> None:
        """Delete adapters that were not used for their time to live."""
        now = self._clock()
        used_before = now - USE_NOTED_EVERY_S
        for name in await self._references.idle_adapters(used_before=used_before, now=now):
            try:
                async with asyncio.timeout(DELETE_TIMEOUT_S):
                    await self._adapters.delete_idle_adapter(name)
            except (FailedPrecondition, NotFound):
                continue  # it was used, or deleted, meanwhile
            except TimeoutError:
                _log.warning("%s is idle, and its deletion has to wait for its calls", name)
                continue
            except MeshError as error:
                _log.warning("%s is idle and cannot be deleted now: %s", name, error)
                continue
            _log.info("%s was idle for its time to live and is deleted", name)

    async def sweep_blobs(self) -> None:
        """Delete blobs that no row has referred to for GRACE_S."""
        listed = await asyncio.to_thread(self._listed)
        referenced = await self._references.blob_keys()
        now = self._clock()
        self._unreferenced = {
            key: self._unreferenced.get(key, now)
            for key in listed
            if not _is_referenced(key, referenced)
        }
        due = [key for key, since in self._unreferenced.items() if since <= now - GRACE_S]
        if due:
            await asyncio.to_thread(self._delete, due)
            _log.info("%d blobs that nothing refers to are deleted", len(due))

    def _listed(self) -> list[str]:
        return [key for prefix in PREFIXES for key, _ in self._blobs.keys(prefix)]

    def _delete(self, keys: list[str]) -> None:
        for key in keys:
            self._blobs.delete(key)


def _is_referenced(key: str, referenced: set[str]) -> bool:
    """Whether a row refers to the blob or to a folder that it is in."""
    parts = key.split("/")
    return any("/".join(parts[:count]) in referenced for count in range(1, len(parts) + 1))
