"""All adapters of a trainer by name: how they come and go, and how many there may be.

All of it happens on the event loop, between two awaits; only what takes long is done elsewhere and
put in place when it is complete. So reads never wait, and two calls for one name cannot both win.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from rollmesh.errors import (
    AlreadyExists,
    CapacityExhausted,
    FailedPrecondition,
    Fenced,
    InvalidRequest,
    NotFound,
)
from rollmesh.names import parse_adapter
from rollmesh.telemetry import log_fields, span, timed
from rollmesh.types import HeldAdapter, TrainerInfo
from services.trainer.adapter import Adapter, check_shape, fenced
from services.trainer.checks import resolve_lora
from services.trainer.memory import AdapterSizes
from services.trainer.state import State, begin, fresh_weights

if TYPE_CHECKING:
    from rollmesh.types import LoraConfig, Snapshot, TrainerAdapter
    from services.trainer.engine import Engine
    from services.trainer.export import AdapterVersion
    from services.trainer.exports import Exports
    from services.trainer.model import Model
    from services.trainer.snapshots import Snapshots
    from services.trainer.uninterrupted import Uninterrupted

log = logging.getLogger(__name__)

SILENCE_S = 2.0
"""After so many seconds without a GetTrainer no coordinator is there to move anything away."""


class Adapters:
    """The adapters on one model.

    Args:
        uninterrupted: runs the ops that have begun.
        base_model: the model's name.
        max_adapters: held at once.
        max_adapter_bytes: that they may take, as AdapterSizes counts.
        kept_versions: published versions kept of each.
        max_queued_ops: that may wait for the op of the same adapter that runs.
        instance_id: that no other process has.
    """

    def __init__(
        self,
        model: Model,
        engine: Engine,
        snapshots: Snapshots,
        exports: Exports,
        uninterrupted: Uninterrupted,
        *,
        base_model: str,
        max_rank: int,
        max_adapters: int,
        max_adapter_bytes: int,
        kept_versions: int,
        max_queued_ops: int,
        instance_id: str,
    ) -> None:
        self._model = model
        self._engine = engine
        self._snapshots = snapshots
        self._exports = exports
        self._uninterrupted = uninterrupted
        self._base_model = base_model
        self._max_rank = max_rank
        self._max_adapters = max_adapters
        self._max_adapter_bytes = max_adapter_bytes
        self._kept_versions = kept_versions
        self._max_queued_ops = max_queued_ops
        self._instance_id = instance_id
        self._sizes = AdapterSizes(model.lora, kept_versions=kept_versions)
        self._adapters: dict[str, Adapter] = {}
        self._draining = False
        self._asked_at = float("-inf")
        self._news = asyncio.Event()

    def info(self) -> TrainerInfo:
        """What is served, what is held and how full it is."""
        self._asked_at = asyncio.get_running_loop().time()
        self._news.set()
        return TrainerInfo(
            base_model=self._base_model,
            vocab_size=self._model.vocab_size,
            max_length=self._model.max_length,
            max_rank=self._max_rank,
            num_adapters=len(self._adapters),
            max_adapters=self._max_adapters,
            target_modules=self._model.lora.target_modules,
            kept_versions=self._kept_versions,
            instance_id=self._instance_id,
            draining=self._draining,
            held=tuple(HeldAdapter(name, held.epoch) for name, held in self._adapters.items()),
            adapter_bytes=sum(self._sizes.of(held.lora) for held in self._adapters.values()),
            max_adapter_bytes=self._max_adapter_bytes,
        )

    async def create(
        self,
        name: str,
        lora: LoraConfig | None,
        *,
        epoch: int,
        fork_of: Snapshot | None = None,
        with_optimizer: bool = False,
    ) -> TrainerAdapter:
        """An adapter, fresh or with a snapshot's shape and weights; or the one that is held.

        Raises:
            InvalidRequest: the name, the epoch, or a field of `lora`.
            AlreadyExists: it is held under this epoch, and a fresh one with another configuration.
            Fenced: it is held under a higher epoch.
            CapacityExhausted: max_adapters or max_adapter_bytes would be exceeded.
            FailedPrecondition: `lora` is another shape than the snapshot's.
            Else as Snapshots.manifest and Snapshots.read.
        """
        if lora is None and fork_of is None:
            raise InvalidRequest("lora: needed where there is no fork_of", field="lora")
        wanted = None if lora is None else self._resolved(lora)
        if held := self._held_under(name, epoch):
            if fork_of is None and wanted != held.lora:
                raise AlreadyExists(f"{name} exists with {held.lora}", resource=name)
            return held.view
        if fork_of is not None:
            manifest = await self._snapshots.manifest(fork_of)
            shape = self._resolved(manifest.lora.lora())
            if wanted is not None:
                check_shape(fork_of, shape, wanted)
            self._check_room(name, shape)
            state = await self._snapshots.read_to_begin(
                fork_of, manifest, with_optimizer=with_optimizer
            )
            return self._hold(name, shape, state, epoch)
        assert wanted is not None  # noqa: S101 - checked at the start
        self._check_room(name, wanted)
        state = await self._engine.run(_fresh, self._model, wanted)
        return self._hold(name, wanted, state, epoch)

    async def restore(self, name: str, snapshot: Snapshot, *, epoch: int) -> TrainerAdapter:
        """The adapter as its snapshot has it, or the one that is held under this epoch.

        Raises:
            FailedPrecondition: the snapshot is another adapter's.
            Else as `create`.
        """
        if held := self._held_under(name, epoch):
            return held.view
        with span("trainer.restore", adapter=name), timed("rollmesh.trainer.op", op="restore"):
            manifest = await self._snapshots.manifest(snapshot)
            if manifest.adapter != name:
                raise FailedPrecondition(
                    f"{snapshot.key} is of {manifest.adapter}, not of {name}",
                    resource=snapshot.key,
                    field="adapter",
                    value=manifest.adapter,
                    allowed=name,
                )
            lora = self._resolved(manifest.lora.lora())
            self._check_room(name, lora)
            state = await self._snapshots.read(snapshot, manifest)
        return self._hold(name, lora, state, epoch)

    def get(self, name: str) -> Adapter:
        """An adapter, to ask something of it.

        Raises:
            NotFound: it is not held.
        """
        try:
            return self._adapters[name]
        except KeyError:
            raise NotFound(f"{name!r} is not held by this trainer", resource=name) from None

    def view(self, name: str) -> TrainerAdapter:
        """An adapter as its newest finished op left it. NotFound: it is not held."""
        return self.get(name).view

    def version(self, name: str, policy_version: int) -> AdapterVersion:
        """See Adapter.version."""
        return self.get(name).version(policy_version)

    def delete(self, name: str, *, epoch: int) -> None:
        """Free an adapter and its versions; one that is not held is fine.

        Raises:
            Fenced: it is held under a higher epoch.
        """
        _check_epoch(epoch)
        held = self._adapters.get(name)
        if held is None:
            return
        if epoch < held.epoch:
            raise fenced(name, epoch, held=held.epoch)
        del self._adapters[name]
        held.let_go(NotFound)
        self._news.set()
        with log_fields(adapter=name):
            log.info("deleted")

    async def moved_away(self, within_s: float) -> None:
        """Say that it drains, and return once nothing is held any more.

        Or `within_s` seconds have passed, or nobody has called `info` for SILENCE_S.
        """
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._adapters:
                    self._news.clear()
                    async with asyncio.timeout_at(self._asked_at + SILENCE_S):
                        await self._news.wait()

    def _held_under(self, name: str, epoch: int) -> Adapter | None:
        """The adapter if it is held under this epoch; None: there is none, or an older one."""
        parse_adapter(name)
        _check_epoch(epoch)
        held = self._adapters.get(name)
        if held is not None and epoch < held.epoch:
            raise fenced(name, epoch, held=held.epoch)
        return held if held is not None and epoch == held.epoch else None

    def _resolved(self, lora: LoraConfig) -> LoraConfig:
        layers = self._model.lora
        return resolve_lora(
            lora,
            max_rank=self._max_rank,
            target_modules=layers.target_modules,
            unembedding=layers.unembedding,
        )

    def _check_room(self, name: str, lora: LoraConfig) -> None:
        """Refuse what has no room; the one that `name` would replace takes none."""
        others = [held for other, held in self._adapters.items() if other != name]
        if len(others) >= self._max_adapters:
            raise CapacityExhausted(
                f"{len(others)} adapters are held, max_adapters is {self._max_adapters}",
                resource="adapters",
                value=len(others),
                allowed=self._max_adapters,
            )
        needed = self._sizes.of(lora) + sum(self._sizes.of(held.lora) for held in others)
        if needed > self._max_adapter_bytes:
            raise CapacityExhausted(
                f"with {name} the adapters would take {needed} bytes, "
                f"max_adapter_bytes is {self._max_adapter_bytes}",
                resource="adapter bytes",
                value=needed,
                allowed=self._max_adapter_bytes,
            )

    def _hold(self, name: str, lora: LoraConfig, state: State, epoch: int) -> TrainerAdapter:
        """Put a complete adapter in place, if nobody else has meanwhile."""
        if held := self._held_under(name, epoch):
            if held.lora != lora:
                raise AlreadyExists(f"{name} exists with {held.lora}", resource=name)
            return held.view
        self._check_room(name, lora)
        if replaced := self._adapters.pop(name, None):
            replaced.let_go(Fenced)
        self._adapters[name] = adapter = Adapter(
            name,
            lora,
            state,
            epoch=epoch,
            model=self._model,
            engine=self._engine,
            snapshots=self._snapshots,
            exports=self._exports,
            uninterrupted=self._uninterrupted,
            base_model=self._base_model,
            kept_versions=self._kept_versions,
            max_queued_ops=self._max_queued_ops,
        )
        with log_fields(adapter=name, epoch=epoch, next_sequence=state.next_sequence):
            log.info("held")
        return adapter.view


def _fresh(model: Model, lora: LoraConfig) -> State:
    return begin(fresh_weights(model.lora, lora))


def _check_epoch(epoch: int) -> None:
    if epoch < 1:
        raise InvalidRequest(
            f"epoch: {epoch}, must be ≥ 1", field="epoch", value=epoch, allowed="≥ 1"
        )
