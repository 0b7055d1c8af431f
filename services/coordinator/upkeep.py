"""Keeps adapters where they belong when trainers come and go, before anybody asks for them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING

from rollmesh.errors import Fenced, MeshError, NotFound
from services.coordinator.store import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from typing import Any

    from services.coordinator.delivery import Delivery
    from services.coordinator.fleet.membership import Fleet, Trainer
    from services.coordinator.ownership import Ownership
    from services.coordinator.recovery import Recovery
    from services.coordinator.snapshots import Snapshots
    from services.coordinator.store import AdapterStore, OpStore, StoredAdapter
    from services.coordinator.turns import Turns

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
NUM_AT_ONCE = 4
"""Adapters of one trainer that are recovered, moved or let go of at once."""
EXPIRE_EVERY_S = 60.0


class Upkeep:
    """What is wrong is found by comparing rows with what trainers say; see `run`."""

    def __init__(
        self,
        store: AdapterStore,
        ops: OpStore,
        fleet: Fleet,
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
        # By the trainer that an adapter is or was at, so that one that hangs holds up no other's.
        self._at_once: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(NUM_AT_ONCE)
        )
        # By the adapter, and the trainer that is to let go of it; "": it is to be mended.
        self._under_way: set[tuple[str, str]] = set()
        self._problems: dict[tuple[str, str], str] = {}  # told already

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
        self._problems = {key: told for key, told in self._problems.items() if key[0] in adapters}
        for name, stored in adapters.items():
            if self._is_amiss(stored, tails):
                self._begin(tasks, (name, ""), partial(self._mend, name))
            elif stored.counts and not stored.ready and not self._turns.is_busy(name):
                # Whoever made it was cancelled, or could not write down how it ended.
                self._begin(tasks, (name, ""), partial(self._give_up, name))
        for trainer in self._fleet.all_trainers():
            for name in self._astray(trainer, adapters):
                self._begin(tasks, (name, trainer.address), partial(self._drop, name, trainer))

    def _begin(
        self,
        tasks: asyncio.TaskGroup,
        key: tuple[str, str],
        work: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        if key not in self._under_way:
            self._under_way.add(key)
            tasks.create_task(self._tried(key, work))

    async def _tried(
        self, key: tuple[str, str], work: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        try:
            await work()
        except MeshError as error:
            if self._problems.get(key) != str(error):
                self._problems[key] = str(error)
                log.warning("%s", error)
        else:
            self._problems.pop(key, None)
        finally:
            self._under_way.discard(key)

    def _is_amiss(self, stored: StoredAdapter, tails: set[str]) -> bool:
        if not stored.ready or stored.problem:
            return False
        name = stored.adapter.name
        return (
            not self._recovery.is_current(stored)
            # The tail of an adapter in use is what is under way there.
            or (name in tails and not self._turns.is_busy(name))
            or (self._ownership.is_draining(stored.trainer) and self._recovery.can_move(stored))
        )

    async def _mend(self, name: str) -> None:
        await self._turns.take(name, lambda: self._mend_in_turn(name))

    async def _give_up(self, name: str) -> None:
        await self._turns.take(name, lambda: self._store.not_being_made(name))

    async def _mend_in_turn(self, name: str) -> None:
        stored = await self._store.get(name)
        async with self._at_once[stored.trainer]:
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

    async def _drop(self, name: str, trainer: Trainer) -> None:
        """Have `trainer` let go of an adapter, if it still does not own it.

        Only the question takes a turn, after a creation that is under way: an adapter in use
        elsewhere does not wait for its former trainer, where the epoch says which copy is meant.
        """
        epoch = await self._turns.take(name, lambda: self._former_epoch(name, trainer))
        if epoch is None:
            return
        log.info("%s at %s is no more than a former copy", name, trainer.address)
        async with self._at_once[trainer.address]:
            # Fenced: it owns it again, under a later epoch.
            with contextlib.suppress(Fenced):
                async with self._ownership.call(trainer.address):
                    await trainer.port.delete_adapter(name, epoch=epoch)

    async def _former_epoch(self, name: str, trainer: Trainer) -> int | None:
        """The epoch under which `trainer` holds an adapter that it does not own."""
        held = {each.name: each.epoch for each in (trainer.info.held if trainer.info else ())}
        stored: StoredAdapter | None = None
        with contextlib.suppress(NotFound):
            stored = await self._store.get(name)
        if name in held and not _owns(trainer, stored, epoch=held[name]):
            return held[name]
        return None

    async def _expire(self) -> None:
        while True:
            try:
                while await self._ops.expire(before=self._clock() - self._result_retention_s):
                    pass
            except StoreUnavailable as error:
                log.warning("old results are not let go of: %s", error)
            await asyncio.sleep(EXPIRE_EVERY_S)


def _owns(trainer: Trainer, stored: StoredAdapter | None, *, epoch: int) -> bool:
    """Whether the adapter exists, and is `trainer`'s under `epoch`."""
    if stored is None or not stored.ready:
        return False
    return (stored.trainer, stored.epoch) == (trainer.address, epoch)
