"""The adapter versions that are here: pulled once however many ask, on disk, and bounded.

A version is known by adapter, policy_version and digest, so weights that someone published under
a name used before are never taken for the old ones. It leaves only when nobody holds it, the least
recently used one first, and can always be pulled again.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import logging
import shutil
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

from rollmesh.errors import InternalError, MeshError, Unavailable
from rollmesh.telemetry import log_fields, record, span
from services.sampler.backends.base import LoadedAdapter
from services.sampler.peft_folder import check_export, write_folder
from services.sampler.room import Room

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from rollmesh.types import AdapterExport, AdapterSource
    from services.sampler.download import Transfer

log = logging.getLogger(__name__)

Key = tuple[str, int, str]


@dataclass(eq=False)
class _Version:
    """One version on its way in, here, or on its way out."""

    source: AdapterSource
    adapter: LoadedAdapter
    bringing: asyncio.Task[None] | None = None
    users: int = 0
    waiting: bool = False
    """For room; it is not worth that once nobody wants it any more."""
    retired: bool = False
    """No new request gets it; it is freed when the last one is done."""
    freeing: bool = False
    error: MeshError | None = None
    pull_s: float | None = None
    """Set once it is here."""
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it is here or has failed (`error`)."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def key(self) -> Key:
        return self.source.adapter, self.source.policy_version, self.source.digest

    @property
    def idle(self) -> bool:
        """It is here, and nobody holds it."""
        return not self.users and self.arrived.is_set()


class Adapters:
    """The adapter versions of one sampler; an async context manager, inside which it is used.

    Args:
        pull: as Sources.pull.
        folder: where they are put.
        release: awaited before a version's files are removed. Unavailable: the engine is dead.
        max_versions: that are here or being pulled.
        max_bytes: of their tensors, in all.
    """

    def __init__(
        self,
        pull: Callable[
            [AdapterSource, Callable[[AdapterExport], Awaitable[None]]], Awaitable[Transfer]
        ],
        folder: Path,
        *,
        release: Callable[[LoadedAdapter], Awaitable[None]],
        base_model: str,
        max_rank: int,
        max_versions: int,
        max_bytes: int,
    ) -> None:
        self._pull = pull
        self._folder = folder
        self._release = release
        self._base_model = base_model
        self._max_rank = max_rank
        self._room: Room[_Version] = Room(
            max_owners=max_versions, max_bytes=max_bytes, evict=self._evict
        )
        # Least recently used first.
        self._versions: dict[Key, _Version] = {}
        # Retired, and still held or being freed.
        self._leaving: set[_Version] = set()
        self._numbers = itertools.count(1)
        # Pulling and freeing go on when the request that caused them is cancelled.
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        for version in [*self._versions.values(), *self._leaving]:
            assert version.bringing is not None  # noqa: S101 - set where it is made
            version.bringing.cancel()
        await self._tasks.__aexit__(None, None, None)

    def here(self) -> tuple[tuple[AdapterSource, LoadedAdapter], ...]:
        """The versions that are here; their sources without trainer_address and export_key."""
        return tuple(
            (replace(version.source, trainer_address="", export_key=""), version.adapter)
            for version in self._versions.values()
            if version.pull_s is not None
        )

    def is_here(self, source: AdapterSource) -> bool:
        """To hold it takes no time."""
        version = self._versions.get(_key(source))
        return version is not None and version.pull_s is not None

    async def pull(self, source: AdapterSource) -> float:
        """Seconds until `source` was here, 0 where it is here already; errors as `hold`."""
        was_here = self.is_here(source)
        async with self._held(source) as version:
            assert version.pull_s is not None  # noqa: S101 - _held returns what is here
            return 0.0 if was_here else version.pull_s

    @contextlib.asynccontextmanager
    async def hold(self, source: AdapterSource) -> AsyncIterator[LoadedAdapter]:
        """Keep `source` here while the block runs, pulling it first where needed.

        Where every version that is here is held, it waits for room.

        Raises:
            SourceUnavailable: the trainer, or the blob store, cannot be reached.
            NotFound: neither has it.
            DigestMismatch: what arrived is not what `source` says.
            FailedPrecondition: it is not in PEFT's format.
            InvalidRequest: of another base model, or of too large a rank; not the key of a blob.
            CapacityExhausted: it alone is too large, or the disk is full.
        """
        async with self._held(source) as version:
            yield version.adapter

    async def unload(self, adapter: str, policy_version: int | None) -> None:
        """Return once a version (None: every version) of `adapter` is gone and nobody holds it.

        A request that comes meanwhile pulls the version anew.
        """
        leaving = [
            version
            for version in [*self._versions.values(), *self._leaving]
            if version.source.adapter == adapter
            and policy_version in {None, version.source.policy_version}
        ]
        for version in leaving:
            self._retire(version)
        for version in leaving:
            await version.gone.wait()

    def discard(self, adapter: LoadedAdapter) -> None:
        """Give this copy of a version to no new request: the next one pulls another.

        It is freed when nobody holds it any more; fine if it has left already.
        """
        for version in self._versions.values():
            if version.adapter is adapter:
                self._retire(version)
                return

    @contextlib.asynccontextmanager
    async def _held(self, source: AdapterSource) -> AsyncIterator[_Version]:
        version = self._versions.get(_key(source)) or self._begin(source)
        version.users += 1
        try:
            await version.arrived.wait()
            if version.error is not None:
                # To each its own: an exception collects the traceback of everyone who raises it.
                raise copy.copy(version.error)
            yield version
        finally:
            version.users -= 1
            if not version.retired:
                self._versions[version.key] = self._versions.pop(version.key)
            self._settle(version)

    def _begin(self, source: AdapterSource) -> _Version:
        """A new version, which is on its way."""
        number = next(self._numbers)
        adapter = LoadedAdapter(
            number=number,
            name=f"{source.adapter}/versions/{source.policy_version}#{number}",
            # A name of our own making: nothing that a client sent reaches the file system.
            folder=self._folder / str(number),
            digest=source.digest,
        )
        version = self._versions[_key(source)] = _Version(source, adapter)
        version.bringing = self._tasks.create_task(self._bring(version))
        return version

    async def _bring(self, version: _Version) -> None:
        """Pull `version`; a failure is told to those who wait, and then forgotten."""
        source = version.source
        begun_at = time.perf_counter()
        with log_fields(adapter=source.adapter, policy_version=source.policy_version):
            try:
                await self._take_room(version, 0)
                with span(
                    "sampler.pull", adapter=source.adapter, policy_version=source.policy_version
                ):
                    transfer = await self._pull(source, lambda export: self._admit(version, export))
                    await asyncio.to_thread(write_folder, transfer, version.adapter.folder)
                config = transfer.export.adapter_config_json
                version.adapter = replace(version.adapter, config=config)
                version.pull_s = time.perf_counter() - begun_at
                record("rollmesh.sampler.load", version.pull_s, part="pull")
                log.info("adapter version is here")
            except MeshError as error:
                log.warning("adapter version did not come: %s", error)
                version.error = error
            except asyncio.CancelledError:
                version.error = Unavailable("the sampler is going away")
                raise
            except Exception:
                log.exception("bug while bringing an adapter version")
                version.error = InternalError(
                    "internal error; the server's log has the traceback",
                    resource=source.adapter,
                )
            finally:
                version.arrived.set()
                if version.error is not None:
                    self._retire(version)
                self._settle(version)

    async def _admit(self, version: _Version, export: AdapterExport) -> None:
        """Return when there is room for what has this header."""
        check_export(export, base_model=self._base_model, max_rank=self._max_rank)
        await self._take_room(version, export.num_bytes)

    async def _take_room(self, version: _Version, num_bytes: int) -> None:
        if self._room.take_at_once(version, num_bytes):
            return
        version.waiting = True
        self._settle(version)  # Whoever wanted it may have gone before it began to wait.
        try:
            await self._room.take(version, num_bytes)
        finally:
            version.waiting = False

    def _evict(self) -> bool:
        """Retire the least recently used version that nobody holds; False: there is none."""
        idle = next((version for version in self._versions.values() if version.idle), None)
        if idle is not None:
            self._retire(idle)
        return idle is not None

    def _retire(self, version: _Version) -> None:
        """Give `version` to no new request; it is freed after the last one."""
        if not version.retired:
            version.retired = True
            del self._versions[version.key]
            self._leaving.add(version)
            self._settle(version)

    def _settle(self, version: _Version) -> None:
        """Do what follows from a change of who wants `version`, or of how far it has come."""
        if version.users or version.freeing:
            return
        if not version.arrived.is_set():
            if version.waiting:
                assert version.bringing is not None  # noqa: S101 - set where it is made
                version.waiting = False
                self._retire(version)
                version.bringing.cancel()
        elif version.retired:
            version.freeing = True
            self._room.leaves(version)
            self._tasks.create_task(self._free(version))
        else:
            self._room.changed()

    async def _free(self, version: _Version) -> None:
        try:
            if version.pull_s is not None:
                with contextlib.suppress(Unavailable):  # The engine is dead, and all in it.
                    await self._release(version.adapter)
        finally:
            await asyncio.to_thread(shutil.rmtree, version.adapter.folder, ignore_errors=True)
            self._leaving.discard(version)
            self._room.free(version)
            version.gone.set()


def _key(source: AdapterSource) -> Key:
    return source.adapter, source.policy_version, source.digest
