"""Snapshots of adapters: to the blob store and back, bit for bit, beside the ops that go on.

The layout is that of rollmesh/snapshots.py. In the file `state` a tensor has the name of its
parameter in the file `adapter` after `first_moment.`, `second_moment.` or `gradient.`.
"""

from __future__ import annotations

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast

import torch
from safetensors.torch import load, save

from rollmesh import snapshots as layout
from rollmesh.digest import safetensors_digest
from rollmesh.errors import FailedPrecondition, Overloaded
from services.trainer.export import parameter_names, peft_config, peft_file
from services.trainer.optimizer import AdamState
from services.trainer.state import State, begin, fresh_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from rollmesh.blobs import Blobs
    from rollmesh.snapshots import Manifest
    from rollmesh.types import LoraConfig, Snapshot
    from services.trainer.lora import LoraLayers

P = ParamSpec("P")
T = TypeVar("T")

_PREFIXES = ("first_moment", "second_moment", "gradient")
NUM_THREADS = 2
"""Snapshots that are written or read at once. Each holds a copy of its adapter in main memory."""


class Snapshots:
    """Writes and reads snapshots of adapters on `layers`; at most `max_queued` wait.

    Args:
        new_id: 32 hexadecimal digits that were never used before.
    """

    def __init__(
        self,
        blobs: Blobs,
        layers: LoraLayers,
        *,
        base_model: str,
        new_id: Callable[[], str],
        max_queued: int,
    ) -> None:
        self._blobs = blobs
        self._layers = layers
        self._base_model = base_model
        self._new_id = new_id
        self._max_queued = max_queued
        self._queued = 0
        self._turn = asyncio.Semaphore(NUM_THREADS)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="trainer-snapshots")

    async def write(self, adapter: str, lora: LoraConfig, take: Callable[[], State]) -> Snapshot:
        """Store what `take` returns when the turn comes; return once it is durable.

        Raises:
            Overloaded: max_queued wait already.
            Unavailable: the blob store does not answer.
        """
        return await self._in_thread(lambda: partial(self._write, adapter, lora, take()))

    async def manifest(self, snapshot: Snapshot) -> Manifest:
        """The manifest of a snapshot that an adapter here can have.

        Raises:
            InvalidRequest: its key.
            NotFound: it is gone.
            DigestMismatch: it is another.
            FailedPrecondition: it is of another base model.
        """
        manifest = await self._in_thread(
            lambda: partial(layout.read_manifest, self._blobs, snapshot)
        )
        if manifest.base_model != self._base_model:
            raise FailedPrecondition(
                f"{snapshot.key} is of the base model {manifest.base_model!r}, "
                f"here it is {self._base_model!r}",
                resource=snapshot.key,
                field="base_model",
                value=manifest.base_model,
                allowed=self._base_model,
            )
        return manifest

    async def read(self, snapshot: Snapshot, manifest: Manifest) -> State:
        """All of a snapshot: the state that was written.

        Raises:
            NotFound: it is gone.
            DigestMismatch: a file is not what was written.
            FailedPrecondition: its tensors are not those of its shape here.
        """
        return await self._in_thread(lambda: partial(self._read, snapshot, manifest))

    async def read_to_begin(
        self, snapshot: Snapshot, manifest: Manifest, *, with_optimizer: bool
    ) -> State:
        """A snapshot's weights, and on demand its optimizer; without counters or gradients."""
        if with_optimizer:
            state = await self.read(snapshot, manifest)
            return begin(state.weights, state.adam)
        return await self._in_thread(lambda: partial(self._read_weights, snapshot, manifest))

    def close(self) -> None:
        """Return when those under way have ended; no other is begun."""
        self._threads.shutdown(cancel_futures=True)

    async def _in_thread(self, prepare: Callable[[], Callable[[], T]]) -> T:
        """What the call returns that `prepare` makes once a thread is free.

        A caller that goes away does not interrupt a call that has begun.
        """
        if self._queued >= self._max_queued:
            raise Overloaded(
                f"{self._queued} snapshots wait, max_queued_ops is {self._max_queued}",
                resource="queued snapshots",
                value=self._queued,
                allowed=self._max_queued,
            )
        self._queued += 1
        try:
            await self._turn.acquire()
        finally:
            self._queued -= 1
        try:
            call = prepare()
            # The thread sees the caller's trace and log fields.
            context = contextvars.copy_context()
            running = asyncio.get_running_loop().run_in_executor(
                self._threads, lambda: context.run(call)
            )
        except BaseException:
            self._turn.release()
            raise
        running.add_done_callback(lambda _: self._turn.release())
        return await asyncio.shield(running)

    def _write(self, adapter: str, lora: LoraConfig, state: State) -> Snapshot:
        files: dict[layout.FileName, bytes] = {
            "adapter": peft_file(state.weights),
            "state": save(_state_tensors(state)),
        }
        manifest = layout.Manifest(
            adapter=adapter,
            base_model=self._base_model,
            lora=layout.Shape(
                rank=lora.rank,
                alpha=cast("float", lora.alpha),
                target_modules=lora.target_modules,
                seed=lora.seed,
            ),
            policy_version=state.policy_version,
            next_sequence=state.next_sequence,
            adam_step=state.adam.step,
            has_pending_gradients=state.pending is not None,
            adapter_config_json=peft_config(lora, self._base_model),
            weights_digest=safetensors_digest(files["adapter"]),
            files={name: layout.StoredFile.of(content) for name, content in files.items()},
        )
        key = f"snapshots/{self._new_id()}"
        return layout.write_snapshot(self._blobs, key, manifest, files)

    def _read(self, snapshot: Snapshot, manifest: Manifest) -> State:
        state = self._read_weights(snapshot, manifest)
        tensors = load(layout.read_file(self._blobs, snapshot, manifest, "state"))
        prefixes = _PREFIXES if manifest.has_pending_gradients else _PREFIXES[:2]
        names = [f"{part}.{name}" for part in prefixes for name in parameter_names(state.weights)]
        like = state.weights.parameters()
        taken = _taken(snapshot, tensors, names, like * len(prefixes))
        first, second, *pending = (
            taken[start : start + len(like)] for start in range(0, len(taken), len(like))
        )
        return replace(
            state,
            adam=AdamState(manifest.adam_step, first, second),
            pending=pending[0] if pending else None,
            policy_version=manifest.policy_version,
            next_sequence=manifest.next_sequence,
        )

    def _read_weights(self, snapshot: Snapshot, manifest: Manifest) -> State:
        like = fresh_weights(self._layers, manifest.lora.lora())
        tensors = load(layout.read_file(self._blobs, snapshot, manifest, "adapter"))
        names = parameter_names(like)
        return begin(like.replaced(_taken(snapshot, tensors, names, like.parameters())))


def _state_tensors(state: State) -> dict[str, Tensor]:
    parts = (state.adam.first_moments, state.adam.second_moments, state.pending)
    names = parameter_names(state.weights)
    return {
        f"{prefix}.{name}": tensor.cpu()
        for prefix, tensors in zip(_PREFIXES, parts, strict=True)
        if tensors is not None
        for name, tensor in zip(names, tensors, strict=True)
    }


def _taken(
    snapshot: Snapshot, tensors: Mapping[str, Tensor], names: Sequence[str], like: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Copies of `tensors` by `names`, each of the shape and on the device of its place in `like`.

    In memory of their own, and not that of the file: matrix products may give other bits where
    their factors are aligned otherwise.
    """
    if odd := tensors.keys() - set(names):
        raise FailedPrecondition(
            f"{snapshot.key}: no layer here has {min(odd)}",
            resource=snapshot.key,
            field=min(odd),
        )
    taken = []
    for name, wanted in zip(names, like, strict=True):
        found = tensors.get(name)
        if found is None or found.shape != wanted.shape or found.dtype != torch.float32:
            is_there = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise FailedPrecondition(
                f"{snapshot.key}: {name} is {is_there}, wanted is float32 {list(wanted.shape)}",
                resource=snapshot.key,
                field=name,
                value=is_there,
                allowed=f"torch.float32 {list(wanted.shape)}",
            )
        taken.append(found.clone().to(wanted.device))
    return tuple(taken)
