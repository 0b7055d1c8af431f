"""Keeps adapters where they belong when trainers come and go, before anybody asks for them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from typing import TYPE_CHECKING

from rollmesh.errors import Fenced, MeshError, NotFound
from services.coordinator.store import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from typing import Any

    from services.coordinator.delivery import Delivery
    from services.coordinator.fleet.static import StaticFleet, Trainer
    from services.coordinator.ownership import Ownership
    from services.coordinator.recovery import Recovery
    from services.coordinator.snapshots import Snapshots
    from services.coordinator.store import AdapterStore, OpStore, StoredAdapter
    from services.coordinator.turns import Turns

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
NUM_AT_ONCE = 4
"""Adapters that are recovered at once."""
EXPIRE_EVERY_S = 60.0


class Upkeep:
    """What is wrong is found by comparing rows with what trainers say; see `run`."""

    def __init__(
        self,
        store: AdapterStore,
        ops: OpStore,
        fleet: StaticFleet,
        ownership: Ownership,
        recovery: Recovery,
        delivery: Delivery,
        snapshots: Snapshots,
        turns: Turns,
        *,
        result_retention_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._ops = ops
        self._fleet = fleet
        self._ownership = ownership
        self._recovery = recovery
        self._delivery = delivery
        self._snapshots = snapshots
        self._turns = turns
        self._result_retention_s = result_retention_s
        self._clock = clock
        self._at_once = asyncio.Semaphore(NUM_AT_ONCE)
        self._under_way: set[str] = set()
        self._problems: dict[str, str] = {}  # told already

    async def run(self) -> None:
        """Look after every change of the fleet, and every second, until cancelled."""
        changed = asyncio.Event()
        self._fleet.on_change(changed.set)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._expire())
            while True:
                changed.clear()
                try:
                    await self._look(tasks)
                except StoreUnavailable as error:
                    log.warning("adapters cannot be looked after: %s", error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await changed.wait()

    async def _look(self, tasks: asyncio.TaskGroup) -> None:
        adapters = {stored.adapter.name: stored for stored in await self._store.all()}
        tails = await self._ops.tails()
        self._problems = {name: told for name, told in self._problems.items() if name in adapters}
        for name, stored in adapters.items():
            if self._is_amiss(stored, tails) and not self._turns.is_busy(name):
                self._begin(tasks, name, self._mend)
        for trainer in self._fleet.all_trainers():
            for name in self._astray(trainer, adapters):
                if not self._turns.is_busy(name):  # else it may be about to be made
                    self._begin(tasks, name, partial(self._drop, trainer=trainer))

    def _begin(
        self,
        tasks: asyncio.TaskGroup,
        name: str,
        work: Callable[[str], Coroutine[Any, Any, None]],
    ) -> None:
        if name not in self._under_way:
            self._under_way.add(name)
            tasks.create_task(self._tried(name, work))

    async def _tried(self, name: str, work: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        try:
            async with self._at_once:
                await self._turns.take(name, lambda: work(name))
        except MeshError as error:
            if self._problems.get(name) != str(error):
                self._problems[name] = str(error)
                log.warning("%s", error)
        else:
            self._problems.pop(name, None)
        finally:
            self._under_way.discard(name)

    def _is_amiss(self, stored: StoredAdapter, tails: set[str]) -> bool:
        if not stored.ready or stored.problem:
            return False
        return (
            not self._recovery.is_current(stored)
            or stored.adapter.name in tails
            or (self._ownership.is_draining(stored.trainer) and self._recovery.can_move(stored))
        )

    async def _mend(self, name: str) -> None:
        stored = await self._store.get(name)
        if self._ownership.is_draining(stored.trainer) and self._recovery.can_move(stored):
            try:
                await self._delivery.settle(name)
                await self._snapshots.take(name)
            except MeshError as error:
                log.info("%s moves without a fresh snapshot: %s", name, error)
            await self._recovery.move(name)
        await self._recovery.at_home(name)
        await self._delivery.settle(name)

    def _astray(self, trainer: Trainer, adapters: Mapping[str, StoredAdapter]) -> list[str]:
        """What `trainer` holds, as its last poll says, and does not own."""
        held = trainer.info.held if trainer.serving and trainer.info else ()
        return [
            each.name
            for each in held
            if not _owns(trainer, adapters.get(each.name), epoch=each.epoch)
        ]

    async def _drop(self, name: str, *, trainer: Trainer) -> None:
        """Have `trainer` let go of an adapter, if it still does not own it."""
        held = {each.name: each.epoch for each in (trainer.info.held if trainer.info else ())}
        stored: StoredAdapter | None = None
        with contextlib.suppress(NotFound):
            stored = await self._store.get(name)
        if name in held and not _owns(trainer, stored, epoch=held[name]):
            log.info("%s at %s is no more than a former copy", name, trainer.address)
            # Fenced: it owns it again, under a later epoch.
            with contextlib.suppress(Fenced):
                async with self._ownership.call(trainer.address):
                    await trainer.port.delete_adapter(name, epoch=held[name])

    async def _expire(self) -> None:
        while True:
            try:
                await self._ops.expire(before=self._clock() - self._result_retention_s)
            except StoreUnavailable as error:
                log.warning("old results are not let go of: %s", error)
            await asyncio.sleep(EXPIRE_EVERY_S)


def _owns(trainer: Trainer, stored: StoredAdapter | None, *, epoch: int) -> bool:
    """Whether the adapter exists, and is `trainer`'s under `epoch`."""
    if stored is None or not stored.ready:
        return False
    return (stored.trainer, stored.epoch) == (trainer.address, epoch)
