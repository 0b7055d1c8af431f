"""Hot swap: which adapter versions are live in the engine, and how a version becomes so.

A version is known by adapter, policy_version and digest, so weights that someone published under
a name used before are never taken for the old ones. It is pulled and loaded once however many ask
at a time, leaves only when no request uses it, and can always be pulled again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import shutil
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

from rollmesh.digest import safetensors_digest
from rollmesh.errors import (
    CapacityExhausted,
    DeadlineExceeded,
    DigestMismatch,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    MeshError,
    Overloaded,
    SourceUnavailable,
    Unavailable,
)
from rollmesh.telemetry import log_fields, record, span
from rollmesh.types import AdapterExport, AdapterSource, LoadTimes
from services.sampler.backends.base import LoadedAdapter

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from pathlib import Path

log = logging.getLogger(__name__)

STALL_S = 30.0
"""A transfer that brings nothing for so long is given up."""

Part = AdapterExport | bytes | str
"""A transfer is a header, then chunks of adapter_model.safetensors, then their digest."""


class Loader(Protocol):
    """The part of a Backend that makes adapters ready and frees them."""

    async def load(self, adapter: LoadedAdapter) -> None:
        """As Backend.load."""
        ...

    async def unload(self, adapter: LoadedAdapter) -> None:
        """As Backend.unload."""
        ...


Key = tuple[str, int, str]


@dataclass(eq=False)
class _Version:
    """One version on its way in, live, or on its way out."""

    source: AdapterSource
    adapter: LoadedAdapter
    bringing: asyncio.Task[None] | None = None
    users: int = 0
    retired: bool = False
    """No new request gets it; it is freed when the last one is done."""
    freeing: bool = False
    error: MeshError | None = None
    times: LoadTimes | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it is live (`times`) or has failed (`error`)."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def key(self) -> Key:
        return self.source.adapter, self.source.policy_version, self.source.digest


class Adapters:
    """The adapter versions of one sampler; an async context manager, inside which it is used."""

    def __init__(
        self,
        loader: Loader,
        pull: Callable[[AdapterSource], AsyncGenerator[Part, None]],
        folder: Path,
        *,
        base_model: str,
        max_rank: int,
        max_versions: int,
    ) -> None:
        self._loader = loader
        self._pull = pull
        self._folder = folder
        self._base_model = base_model
        self._max_rank = max_rank
        self._max_versions = max_versions
        # Least recently used first.
        self._versions: dict[Key, _Version] = {}
        # Retired, and still in use or being freed.
        self._leaving: set[_Version] = set()
        self._numbers = itertools.count(1)
        # Loading and freeing go on when the request that caused them is cancelled.
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        for version in [*self._versions.values(), *self._leaving]:
            assert version.bringing is not None  # noqa: S101 - set where it is made
            version.bringing.cancel()
        await self._tasks.__aexit__(None, None, None)

    def live(self) -> tuple[AdapterSource, ...]:
        """The versions that are live, without trainer_address."""
        return tuple(
            replace(version.source, trainer_address="")
            for version in self._versions.values()
            if version.times is not None
        )

    async def ensure(self, source: AdapterSource) -> LoadTimes:
        """Return once `source` is live: what that took, zeros where it was live already.

        Raises:
            SourceUnavailable: the trainer cannot be reached, or its stream was torn.
            DigestMismatch: what arrived is not what `source` says.
            FailedPrecondition: the engine cannot use it.
            InvalidRequest: of another base model, or of too large a rank.
            Overloaded: as many versions as fit are in use.
        """
        known = self._versions.get(_key(source))
        was_live = known is not None and known.times is not None
        async with self._held(source) as version:
            assert version.times is not None  # noqa: S101 - _held returns live ones
            return LoadTimes(0.0, 0.0) if was_live else version.times

    @contextlib.asynccontextmanager
    async def use(self, source: AdapterSource) -> AsyncIterator[LoadedAdapter]:
        """Keep `source` live while the block runs, pulling it first where needed; as `ensure`."""
        async with self._held(source) as version:
            yield version.adapter

    async def unload(self, adapter: str, policy_version: int | None) -> None:
        """Return once a version (None: every version) of `adapter` is gone and no request uses it.

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
            self._free_if_done(version)
        for version in leaving:
            await version.gone.wait()

    @contextlib.asynccontextmanager
    async def _held(self, source: AdapterSource) -> AsyncIterator[_Version]:
        version = self._versions.pop(_key(source), None) or self._begin(source)
        self._versions[version.key] = version
        version.users += 1
        try:
            await version.arrived.wait()
            if version.error is not None:
                raise version.error
            yield version
        finally:
            version.users -= 1
            self._free_if_done(version)

    def _begin(self, source: AdapterSource) -> _Version:
        """A new version, whose pulling has begun; makes room for it first."""
        if len(self._versions) + len(self._leaving) >= self._max_versions:
            idle = next((old for old in self._versions.values() if not old.users), None)
            if idle is None:
                raise Overloaded(
                    f"{self._max_versions} adapter versions are in use, and no more fit",
                    resource="adapter versions",
                    limit=self._max_versions,
                )
            self._retire(idle)
            self._free_if_done(idle)
        number = next(self._numbers)
        adapter = LoadedAdapter(
            number=number,
            name=f"{source.adapter}/versions/{source.policy_version}#{number}",
            # A name of our own making: nothing that a client sent reaches the file system.
            folder=self._folder / str(number),
        )
        version = _Version(source, adapter)
        version.bringing = self._tasks.create_task(self._bring(version))
        return version

    async def _bring(self, version: _Version) -> None:
        """Pull and load `version`; a failure is told to those who wait, and then forgotten."""
        source = version.source
        with log_fields(adapter=source.adapter, policy_version=source.policy_version):
            try:
                version.times = await self._pull_and_load(version)
                log.info("adapter version is live")
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
                self._free_if_done(version)

    async def _pull_and_load(self, version: _Version) -> LoadTimes:
        source, adapter = version.source, version.adapter
        start = time.perf_counter()
        with span("sampler.pull", adapter=source.adapter, policy_version=source.policy_version):
            export, data = await self._receive(source)
            await asyncio.to_thread(_verify_and_write, data, export, source, adapter.folder)
        pulled = time.perf_counter()
        with span("sampler.load", adapter=source.adapter, policy_version=source.policy_version):
            await self._loader.load(adapter)
        loaded = time.perf_counter()
        times = LoadTimes(pull_s=pulled - start, load_s=loaded - pulled)
        record("rollmesh.sampler.load", times.pull_s, part="pull")
        record("rollmesh.sampler.load", times.load_s, part="load")
        return times

    async def _receive(self, source: AdapterSource) -> tuple[AdapterExport, bytearray]:
        """Header and bytes of a whole transfer, whose trailer has the digest of `source`."""
        data = bytearray()
        export: AdapterExport | None = None
        digest: str | None = None
        async with contextlib.aclosing(self._pull(source)) as parts:
            while (part := await _next(parts, source)) is not None:
                if isinstance(part, AdapterExport):
                    self._check(part, source)
                    export = part
                elif isinstance(part, str):
                    digest = part
                elif export is not None and len(data) + len(part) <= export.num_bytes:
                    data += part
                else:
                    raise DigestMismatch(
                        "more bytes arrive than the header says", field="source.digest"
                    )
        if export is None or digest is None:
            raise SourceUnavailable(
                f"{source.trainer_address}: the transfer was torn after {len(data)} bytes",
                resource=source.trainer_address,
            )
        if digest != source.digest:
            raise DigestMismatch(
                f"the trainer holds {digest} as {source.adapter} version {source.policy_version}, "
                f"asked for is {source.digest}",
                field="source.digest",
                value=digest,
                allowed=source.digest,
            )
        return export, data

    def _check(self, export: AdapterExport, source: AdapterSource) -> None:
        """Refuse what belongs elsewhere or does not fit."""
        if (export.adapter, export.policy_version) != (source.adapter, source.policy_version):
            raise DigestMismatch(
                f"the trainer sent {export.adapter} version {export.policy_version}, asked for is "
                f"{source.adapter} version {source.policy_version}",
                field="source",
            )
        if export.base_model != self._base_model:
            raise InvalidRequest(
                f"source: {source.adapter} is an adapter of {export.base_model!r}, this sampler "
                f"has {self._base_model!r}",
                field="source",
                value=export.base_model,
                allowed=self._base_model,
            )
        rank = _rank(export.adapter_config_json)
        if rank > self._max_rank:
            raise InvalidRequest(
                f"source: {source.adapter} has rank {rank}, this sampler takes at most "
                f"{self._max_rank}",
                field="source",
                value=rank,
                allowed=self._max_rank,
            )

    def _retire(self, version: _Version) -> None:
        """Give `version` to no new request; `_free_if_done` frees it after the last one."""
        if not version.retired:
            version.retired = True
            if self._versions.get(version.key) is version:
                del self._versions[version.key]
            self._leaving.add(version)

    def _free_if_done(self, version: _Version) -> None:
        done = not version.users and version.arrived.is_set()
        if version.retired and done and not version.freeing:
            version.freeing = True
            self._tasks.create_task(self._free(version))

    async def _free(self, version: _Version) -> None:
        try:
            if version.times is not None:
                await self._loader.unload(version.adapter)
        except Unavailable:
            pass  # The engine is dead, and the adapter with it.
        finally:
            await asyncio.to_thread(shutil.rmtree, version.adapter.folder, ignore_errors=True)
            self._leaving.discard(version)
            version.gone.set()


def _key(source: AdapterSource) -> Key:
    return source.adapter, source.policy_version, source.digest


async def _next(parts: AsyncGenerator[Part, None], source: AdapterSource) -> Part | None:
    """The next part of a transfer; None at its end."""
    try:
        async with asyncio.timeout(STALL_S):
            return await anext(parts, None)
    except TimeoutError:
        raise SourceUnavailable(
            f"{source.trainer_address}: the transfer brought nothing for {STALL_S:g} s",
            resource=source.trainer_address,
        ) from None
    except (Unavailable, DeadlineExceeded, InternalError) as error:
        # The trainer's trouble, which must not look like this sampler's own.
        raise SourceUnavailable(
            f"{source.trainer_address}: the transfer failed: {error}",
            resource=source.trainer_address,
        ) from error


def _rank(adapter_config_json: str) -> int:
    """Largest rank that a PEFT configuration gives any layer."""
    try:
        config: dict[str, Any] = json.loads(adapter_config_json)
        return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values()), 0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FailedPrecondition(f"adapter_config.json is not PEFT's: {error!r}") from None


def _verify_and_write(
    data: bytearray, export: AdapterExport, source: AdapterSource, folder: Path
) -> None:
    """Write a PEFT folder of exactly the tensors that the digest names."""
    if len(data) != export.num_bytes:
        raise DigestMismatch(
            f"{len(data)} bytes arrived, the header says {export.num_bytes}",
            field="source.digest",
            value=len(data),
            allowed=export.num_bytes,
        )
    try:
        digest = safetensors_digest(memoryview(data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DigestMismatch(
            f"what arrived is not a safetensors file: {error}", field="source.digest"
        ) from None
    if digest != source.digest:
        raise DigestMismatch(
            f"the tensors that arrived have the digest {digest}, asked for is {source.digest}",
            field="source.digest",
            value=digest,
            allowed=source.digest,
        )
    try:
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(data)
        (folder / "adapter_config.json").write_text(export.adapter_config_json, encoding="utf-8")
    except OSError as error:
        raise CapacityExhausted(
            f"cache_dir has no room for an adapter of {len(data)} bytes: {error.strerror}",
            resource="cache_dir",
        ) from None
