"""Checkpoints: made of adapters, gone back to, forked into other adapters, exported.

A checkpoint outlives its adapter: it is a snapshot in the blob store and a row that keeps it there.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.errors import FailedPrecondition, InvalidRequest, NotFound, Overloaded
from rollmesh.names import (
    adapter_name,
    check_id,
    parse_adapter,
    parse_checkpoint,
    project_name,
)
from rollmesh.snapshots import read_file, read_manifest
from services.coordinator.paging import page_size_of
from services.coordinator.store import Request
from services.coordinator.time_to_live import check_ttl

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from rollmesh.blobs import Blobs
    from services.coordinator.adapters import Adapters
    from services.coordinator.store import AdapterStore, CheckpointStore


_CHUNK_BYTES = 1 << 20
_MAX_EXPORTS = 8


class Checkpoints:
    """The checkpoints of all projects.

    Args:
        store: where they are written down.
        adapters: what is kept and made of them.
        adapter_store: their shapes.
        blobs: where the trainers' snapshots are.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: CheckpointStore,
        adapters: Adapters,
        adapter_store: AdapterStore,
        blobs: Blobs,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._adapters = adapters
        self._adapter_store = adapter_store
        self._blobs = blobs
        self._clock = clock
        self._num_exports = 0
        # Two requests for one name wait for each other, so that whoever finds a name reserved knows
        # that nobody is at it any more; a lock lives while somebody uses it.
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def create_checkpoint(
        self, name: str, *, ttl_s: float | None, request_id: str
    ) -> types.Checkpoint:
        """The adapter as its answered ops left it; what the request made before.

        Raises:
            InvalidRequest: the name, or `ttl_s`, the seconds until it expires (None: never).
            NotFound: there is no such adapter.
            AlreadyExists: the name or the request_id is taken.
            Unavailable: its trainer or the blob store is away.
        """
        project, adapter, _ = parse_checkpoint(name)
        check_ttl(ttl_s, field="ttl")
        request = Request.of(project, request_id, "CreateCheckpoint", name, ttl_s)
        async with self._locks.setdefault(name, asyncio.Lock()):
            made = await self._store.reserve(name, request=request, now=self._clock())
            if made is not None:
                return made.checkpoint
            # If this fails the name stays reserved, which is as good as free: see the store.
            stored, snapshot = await self._adapters.snapshot(adapter_name(project, adapter))
            now = self._clock()
            made = await self._store.complete(
                name,
                stored.adapter,
                snapshot,
                now=now,
                expire_time=None if ttl_s is None else now + ttl_s,
            )
            return made.checkpoint

    async def get_checkpoint(self, name: str) -> types.Checkpoint:
        """One checkpoint. NotFound: there is none of that name, or it has expired."""
        parse_checkpoint(name)
        return (await self._store.get(name, now=self._clock())).checkpoint

    async def page(
        self, parent: str, page_size: int, page_token: str
    ) -> tuple[list[types.Checkpoint], str]:
        """Checkpoints of an adapter by name, and the next page's token ("": none)."""
        parse_adapter(parent, field="parent")
        size = page_size_of(page_size)
        after = page_token and check_id(page_token, field="page_token")
        found = await self._store.page(parent, limit=size + 1, after=after, now=self._clock())
        more = len(found) > size
        return found[:size], parse_checkpoint(found[size - 1].name)[2] if more else ""

    async def delete_checkpoint(self, name: str, *, request_id: str) -> None:
        """Delete a checkpoint; a repeat of the request is fine. NotFound: there is none."""
        project, _, _ = parse_checkpoint(name)
        request = Request.of(project, request_id, "DeleteCheckpoint", name)
        async with self._locks.setdefault(name, asyncio.Lock()):
            await self._store.delete(name, request, now=self._clock())

    async def fork_adapter(
        self,
        name: str,
        checkpoint: str,
        *,
        with_optimizer: bool,
        idle_ttl_s: float | None,
        request_id: str,
    ) -> types.Adapter:
        """A new adapter of the same project with a checkpoint's shape and weights.

        Raises:
            NotFound: no such checkpoint, for this project.
            Else as Adapters.create_adapter.
        """
        project, _ = parse_adapter(name)
        if parse_checkpoint(checkpoint, field="checkpoint")[0] != project:
            raise NotFound(f"there is no {checkpoint}", resource=checkpoint)
        source = await self._store.get(checkpoint, now=self._clock())
        return await self._adapters.create_adapter(
            name,
            source.checkpoint.base_model,
            source.checkpoint.lora,
            job="",
            request_id=request_id,
            idle_ttl_s=idle_ttl_s,
            fork_of=source.snapshot,
            with_optimizer=with_optimizer,
        )

    async def load_checkpoint(
        self, adapter: str, sequence: int, checkpoint: str, *, with_optimizer: bool
    ) -> types.LoadResult:
        """A checkpoint's weights in place of an adapter's, as a training op of that adapter.

        Raises:
            InvalidRequest: the checkpoint's name, or it is of another project.
            NotFound: no such adapter or checkpoint.
            FailedPrecondition: they differ in base model or shape; else as any training op.
        """
        project, _ = parse_adapter(adapter, field="adapter")
        if parse_checkpoint(checkpoint, field="checkpoint")[0] != project:
            raise InvalidRequest(
                f"checkpoint: {checkpoint} is of another project than {adapter}",
                field="checkpoint",
                value=checkpoint,
                allowed=f"{project_name(project)}/adapters/{{adapter}}/checkpoints/{{id}}",
            )
        target = (await self._adapter_store.get(adapter)).adapter
        source = await self._store.get(checkpoint, now=self._clock())
        _check_fits(target, source.checkpoint)
        op = types.LoadSnapshot(source.snapshot, with_optimizer)
        result = await self._adapters.train(adapter, sequence, op, job="")
        assert isinstance(result, types.LoadResult)  # noqa: S101 - an op's result is of its kind
        return result

    async def export_checkpoint(
        self, name: str
    ) -> AsyncGenerator[types.AdapterExport | bytes | str]:
        """A header, then chunks of adapter_model.safetensors, then its digest.

        Raises:
            NotFound: there is none of that name.
            DigestMismatch: the blob store has something else than was written.
            Unavailable: the blob store does not answer.
            Overloaded: too many are under way.
        """
        project, adapter, _ = parse_checkpoint(name)
        snapshot = (await self._store.get(name, now=self._clock())).snapshot
        with self._exporting():
            manifest = await asyncio.to_thread(read_manifest, self._blobs, snapshot)
            yield types.AdapterExport(
                adapter_name(project, adapter),
                manifest.policy_version,
                manifest.base_model,
                manifest.adapter_config_json,
                manifest.files["adapter"].num_bytes,
            )
            file = await asyncio.to_thread(read_file, self._blobs, snapshot, manifest, "adapter")
            for start in range(0, len(file), _CHUNK_BYTES):
                yield file[start : start + _CHUNK_BYTES]
            yield manifest.weights_digest

    @contextlib.contextmanager
    def _exporting(self) -> Iterator[None]:
        """Each export has a whole file in memory, for as long as its reader takes."""
        if self._num_exports >= _MAX_EXPORTS:
            raise Overloaded(
                f"{_MAX_EXPORTS} checkpoints are being exported already",
                limit=_MAX_EXPORTS,
            )
        self._num_exports += 1
        try:
            yield
        finally:
            self._num_exports -= 1


def _check_fits(adapter: types.Adapter, checkpoint: types.Checkpoint) -> None:
    """Raise FailedPrecondition, naming all that differs, where a load would change the shape."""
    ours, theirs = adapter.lora, checkpoint.lora
    both = (
        ("base_model", adapter.base_model, checkpoint.base_model),
        ("lora.rank", ours.rank, theirs.rank),
        ("lora.alpha", ours.alpha, theirs.alpha),
        ("lora.target_modules", sorted(ours.target_modules), sorted(theirs.target_modules)),
    )
    different = [(name, its, other) for name, its, other in both if its != other]
    if different:
        told = "; ".join(f"{name} {other!r}, not {its!r}" for name, its, other in different)
        name, its, other = different[0]
        raise FailedPrecondition(
            f"{checkpoint.name} does not fit {adapter.name}: it has {told}",
            resource=checkpoint.name,
            field=name,
            value=other,
            allowed=its,
        )
