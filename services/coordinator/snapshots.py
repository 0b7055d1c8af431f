"""Snapshots of adapters every few ops, beside those that go on: what bounds the journal."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import defaultdict
from typing import TYPE_CHECKING

from rollmesh.errors import MeshError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rollmesh import types
    from services.coordinator.ownership import Ownership
    from services.coordinator.ports import TrainerPort
    from services.coordinator.recovery import Recovery
    from services.coordinator.store import AdapterStore, JournaledOp, StoredAdapter
    from services.coordinator.turns import Turns

log = logging.getLogger(__name__)

NUM_AT_ONCE = 4
"""Snapshots that one trainer writes at once beside ops."""
TIMEOUT_S = 120.0
"""After which one is given up: gigabytes take a slow blob store a minute, and a trainer whose
writing hangs answers its polls and nothing else, ever."""


class Snapshots:
    """Has the trainers write them.

    Args:
        store: where the newest of each adapter is written down.
        recovery: where the adapters are.
        ownership: of the trainers.
        trainers: every configured trainer by address.
        turns: of the adapters.
        every_ops: done ops after which a snapshot is due.
        every_bytes: bytes of their bodies after which one is.
    """

    def __init__(
        self,
        store: AdapterStore,
        recovery: Recovery,
        ownership: Ownership,
        trainers: Mapping[str, TrainerPort],
        turns: Turns,
        *,
        every_ops: int,
        every_bytes: int,
    ) -> None:
        self._store = store
        self._recovery = recovery
        self._ownership = ownership
        self._trainers = trainers
        self._turns = turns
        self._every_ops = every_ops
        self._every_bytes = every_bytes
        # All hold each adapter that exists once at most.
        self._num_bytes: dict[str, int] = {}
        # The newest op that made a snapshot due while another one was being taken.
        self._missed: dict[str, JournaledOp] = {}
        self._due: asyncio.Queue[str] = asyncio.Queue()
        self._wanted: set[str] = set()
        # By trainer, so that one that hangs holds up no other's.
        self._at_once: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(NUM_AT_ONCE)
        )

    async def run(self) -> None:
        """Take those that are due, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                # As many tasks as names are wanted at most.
                tasks.create_task(self._tried(await self._due.get()))

    def note(self, stored: StoredAdapter, op: JournaledOp) -> None:
        """An op was recorded as done.

        Best is a moment without pending gradients, when the snapshot's version can be published
        again: for that an overdue one waits for as long as it took to become due.
        """
        name = op.adapter
        self._num_bytes[name] = self._num_bytes.get(name, 0) + len(op.body or b"")
        if not self._is_due(stored, op):
            return
        if name in self._wanted:
            self._missed[name] = dataclasses.replace(op, body=None)
        else:
            self._want(name)

    def _is_due(self, stored: StoredAdapter, op: JournaledOp) -> bool:
        begin = 1 if stored.snapshot is None else stored.snapshot.next_sequence
        due = max(
            (op.sequence + 1 - begin) / self._every_ops,
            self._num_bytes.get(op.adapter, 0) / self._every_bytes,
        )
        return due >= (2 if op.kind == "forward_backward" else 1)

    def _want(self, name: str) -> None:
        self._wanted.add(name)
        self._due.put_nowait(name)

    def forget(self, name: str) -> None:
        """The adapter is gone."""
        self._num_bytes.pop(name, None)
        self._missed.pop(name, None)

    async def take(self, name: str) -> tuple[StoredAdapter, types.Snapshot]:
        """A snapshot of the adapter as it is, in its turn, and with no tail."""
        stored, snapshot = await self._recovery.call(name, _write)
        await self._keep(stored, snapshot)
        return stored, snapshot

    async def _tried(self, name: str) -> None:
        try:
            await self._take_beside(name)
            missed = self._missed.pop(name, None)
            again = missed is not None and self._is_due(await self._store.get(name), missed)
        except MeshError as error:
            log.warning("no snapshot of %s, until its next op: %s", name, error)
            again = False
        finally:
            self._wanted.discard(name)
        if again:
            self._want(name)

    async def _take_beside(self, name: str) -> None:
        address = (await self._store.get(name)).trainer
        async with self._at_once[address]:
            stored = await self._store.get(name)
            if stored.trainer != address or not self._recovery.is_current(stored):
                return
            async with self._ownership.call(address):
                snapshot = await _write(stored, self._trainers[address])
        # In a turn, so that an op that the snapshot contains is recorded by then.
        await self._turns.take(name, lambda: self._keep(stored, snapshot))

    async def _keep(self, stored: StoredAdapter, snapshot: types.Snapshot) -> None:
        name = stored.adapter.name
        if await self._store.keep_snapshot(name, snapshot, epoch=stored.epoch):
            self._num_bytes.pop(name, None)


async def _write(stored: StoredAdapter, trainer: TrainerPort) -> types.Snapshot:
    name = stored.adapter.name
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await trainer.snapshot_adapter(name, epoch=stored.epoch)
    except TimeoutError:
        raise Unavailable(
            f"the trainer at {stored.trainer} has not written a snapshot of {name} in "
            f"{TIMEOUT_S:g} s",
            resource=name,
        ) from None
