"""Versions made live on all samplers of a base model, and let go of."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from rollmesh.errors import (
    DeadlineExceeded,
    DigestMismatch,
    InternalError,
    MeshError,
    NotFound,
    Overloaded,
    SourceUnavailable,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rollmesh import types
    from services.coordinator.fleet.membership import Fleet, Sampler
    from services.coordinator.placement import Placement

log = logging.getLogger(__name__)

LOAD_WAIT_S = 10.0
"""How long to wait for a sampler whose slots are all busy."""


class Loading:
    """Tells every sampler that serves."""

    def __init__(self, fleet: Fleet, placement: Placement) -> None:
        self._fleet = fleet
        self._placement = placement
        # By adapter: the newest version that is being loaded, and whoever waits for it.
        self._newest: dict[str, tuple[int, list[asyncio.Timeout]]] = {}

    async def load(self, base_model: str, source: types.AdapterSource) -> None:
        """Return once the version is live on every sampler of the base model that is serving.

        One that is away, or goes away, is left out: it pulls the version with its first request. So
        is what has not become live within LOAD_WAIT_S, or by the time when a newer version of the
        adapter is to be loaded. Where a sampler cannot have it, its first request tells.
        """
        if self._newest.get(source.adapter, (-1,))[0] > source.policy_version:
            return
        samplers = self._fleet.samplers(base_model)
        loads: list[asyncio.Task[MeshError | None]] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOAD_WAIT_S) as limit:
                with self._superseding(source, limit):
                    async with asyncio.TaskGroup() as tasks:
                        loads += [tasks.create_task(self._load_on(s, source)) for s in samplers]
        done = [load for load in loads if not load.cancelled()]
        if len(done) < len(loads):
            log.info("version %d of %s is left to first use", source.policy_version, source.adapter)
        for error in filter(None, (load.result() for load in done)):
            raise error

    async def unload(self, base_model: str, adapter: str, policy_version: int | None) -> None:
        """Let go of a version (None: all) everywhere; best effort."""
        async with asyncio.TaskGroup() as tasks:
            for sampler in self._fleet.samplers(base_model):
                tasks.create_task(self._unload_on(sampler, adapter, policy_version))

    @contextlib.contextmanager
    def _superseding(self, source: types.AdapterSource, limit: asyncio.Timeout) -> Iterator[None]:
        """End the wait for older versions, and end this one's when a newer version comes."""
        now = asyncio.get_running_loop().time()
        version, limits = self._newest.get(source.adapter, (-1, []))
        if version < source.policy_version:
            for older in limits:
                if not older.expired():
                    older.reschedule(now)
            limits = []
            self._newest[source.adapter] = source.policy_version, limits
        limits.append(limit)
        try:
            yield
        finally:
            limits.remove(limit)
            newest, _ = self._newest.get(source.adapter, (-1, []))
            if not limits and newest == source.policy_version:
                del self._newest[source.adapter]

    async def _load_on(self, sampler: Sampler, source: types.AdapterSource) -> MeshError | None:
        try:
            await sampler.port.load_adapter(source)
        except (Overloaded, SourceUnavailable, NotFound, DigestMismatch) as error:
            log.warning("%s is not loaded at %s: %s", source.adapter, sampler.address, error)
            return None
        except (Unavailable, DeadlineExceeded, InternalError) as error:
            self._fleet.suspect(sampler, str(error))
            return None
        except MeshError as error:
            return error
        self._placement.note_loaded(sampler, (source.adapter, source.policy_version))
        return None

    async def _unload_on(self, sampler: Sampler, adapter: str, policy_version: int | None) -> None:
        self._placement.note_unloaded(sampler, adapter, policy_version)
        try:
            await sampler.port.unload_adapter(adapter, policy_version)
        except MeshError as error:
            log.info("%s is not unloaded at %s: %s", adapter, sampler.address, error)
