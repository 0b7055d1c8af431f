"""Brings an adapter to the trainer that owns it, in the state that its journal says.

A new owner is written down, under a new epoch, before it is asked: whatever the former one still
does is fenced off. It begins with the adapter's snapshot, or anew, and takes the ops behind that in
their order; being deterministic it comes to the same bits, which the digests of the versions that
were published on the way must prove.

Every method that is a coroutine is to be called in the adapter's turn.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, TypeVar

from rollmesh import types
from rollmesh.errors import (
    AlreadyExists,
    CapacityExhausted,
    FailedPrecondition,
    Fenced,
    InvalidRequest,
    MeshError,
    NotFound,
    SequenceGap,
    Unavailable,
)
from services.coordinator.store import unrecoverable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from services.coordinator.fleet.membership import Trainer
    from services.coordinator.journal import Journal
    from services.coordinator.ownership import Ownership
    from services.coordinator.ports import TrainerPort
    from services.coordinator.store import AdapterStore, StoredAdapter, VersionStore

Result = TypeVar("Result")

log = logging.getLogger(__name__)

# What a trainer says that does not have the adapter as the journal says.
_ASTRAY = (NotFound, Fenced, SequenceGap, AlreadyExists)


LOOK_S = 10.0
"""For a trainer to say what it has of an adapter, which computes nothing."""
RESTORE_S = 300.0
"""For a trainer to read a snapshot: gigabytes from a slow blob store fit in. A trainer that answers
polls and nothing else would hold its adapters up for ever."""


class Recovery:
    """Finds adapters where they are, or brings them where they should be.

    Args:
        store: who owns what.
        versions: what was published of it and is kept.
        journal: the ops.
        ownership: who may own what.
        trainers: every configured trainer by address.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: AdapterStore,
        versions: VersionStore,
        journal: Journal,
        ownership: Ownership,
        trainers: Mapping[str, TrainerPort],
        *,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._versions = versions
        self._journal = journal
        self._ownership = ownership
        self._trainers = trainers
        self._clock = clock
        # Where adapters were found to be as the journal says, and the process that had them there;
        # all hold names of adapters that exist.
        self._found: dict[str, tuple[str, int, str]] = {}
        # Where the versions lie that the last recovery of each published again.
        self._export_keys: dict[str, dict[int, str]] = {}
        self._diverged: set[str] = set()

    def is_current(self, stored: StoredAdapter) -> bool:
        """Whether the adapter is where it should be, as far as anybody has noticed."""
        return self._found.get(stored.adapter.name) == self._place(
            stored
        ) and not self._ownership.is_over(stored.trainer)

    def address(self, name: str) -> str:
        """Where the adapter was found last; "": it is being looked for."""
        return self._found.get(name, ("", 0, ""))[0]

    def export_key(self, name: str, policy_version: int) -> str:
        """Where a version lies since the adapter was recovered; "": where it did before."""
        return self._export_keys.get(name, {}).get(policy_version, "")

    def doubt(self, name: str, *, diverged: bool = False) -> None:
        """Look again before the next call; `diverged`: what its trainer has is something else."""
        self._found.pop(name, None)
        if diverged:
            self._diverged.add(name)

    def found(self, stored: StoredAdapter) -> None:
        """The adapter is where `stored` says."""
        self._found[stored.adapter.name] = self._place(stored)
        self._diverged.discard(stored.adapter.name)

    def forget(self, name: str) -> None:
        """The adapter is gone."""
        self._found.pop(name, None)
        self._diverged.discard(name)
        self._export_keys.pop(name, None)

    async def call(
        self,
        name: str,
        ask: Callable[[StoredAdapter, TrainerPort], Awaitable[Result]],
        read: StoredAdapter | None = None,
    ) -> tuple[StoredAdapter, Result]:
        """What the adapter's trainer answers; asked twice if at first it does not have it.

        `read`: the adapter, where it was read in this same turn.

        Raises:
            NotFound: there is no such adapter, or the trainer still says so.
            FailedPrecondition: the adapter cannot be recovered.
            Unavailable: its trainer, or every one that could take it, is away or full.
        """
        for again in (False, True):
            stored, read = await self.at_home(name, read), None
            try:
                async with self._ownership.call(stored.trainer):
                    return stored, await ask(stored, self._trainers[stored.trainer])
            except _ASTRAY as error:
                self.doubt(name, diverged=again or isinstance(error, AlreadyExists))
                log.info("%s is looked for: %s", name, error)
                if again:
                    raise
            except MeshError:
                self.doubt(name)
                raise
        raise AssertionError("the second time ends it")

    async def at_home(self, name: str, read: StoredAdapter | None = None) -> StoredAdapter:
        """The adapter, after it was recovered if need be. Errors as `call`."""
        stored = read or await self._store.get(name)
        if not stored.ready:
            raise NotFound(f"there is no {name}", resource=name)
        if stored.problem:
            raise unrecoverable(stored)
        if self.is_current(stored):
            return stored
        held = await self._held(stored)
        if held is None:
            stored, held = await self._restore(stored, self._places(stored))
        return await self._caught_up(stored, held)

    async def move(self, name: str) -> None:
        """Bring the adapter to another trainer than its own, if one takes it."""
        stored = await self._store.get(name)
        places = self._elsewhere(stored)
        if places:
            await self._caught_up(*await self._restore(stored, places))

    def can_move(self, stored: StoredAdapter) -> bool:
        """Whether some other trainer may take it."""
        return bool(self._elsewhere(stored))

    async def _held(self, stored: StoredAdapter) -> types.TrainerAdapter | None:
        """What its owner has of it, where the journal can go on from there."""
        name = stored.adapter.name
        owner = self._ownership.trainer(stored.trainer, stored.adapter.base_model)
        if owner is None or name in self._diverged:
            return None
        try:
            async with asyncio.timeout(LOOK_S), self._ownership.call(stored.trainer):
                held = await self._trainers[stored.trainer].get_adapter(name)
        except NotFound:
            return None
        except TimeoutError:
            raise _hangs(name, stored.trainer) from None
        begin = 1 if stored.snapshot is None else stored.snapshot.next_sequence
        end = stored.adapter.next_sequence + (await self._journal.tail(name) is not None)
        fits = held.epoch == stored.epoch and begin <= held.next_sequence <= end
        return held if fits else None

    def _places(self, stored: StoredAdapter) -> list[Trainer]:
        owner = self._ownership.trainer(stored.trainer, stored.adapter.base_model)
        if owner and not owner.serving:
            return []  # It has its lease; and what answers there next may be of another base model.
        return [*([owner] if owner else []), *self._elsewhere(stored)]

    def _elsewhere(self, stored: StoredAdapter) -> list[Trainer]:
        return [
            trainer
            for trainer in self._ownership.candidates(stored.adapter.base_model)
            if trainer.address != stored.trainer
            and trainer.info
            and trainer.info.kept_versions >= stored.num_versions
            and self._ownership.has_room(trainer)
        ]

    async def _restore(
        self, stored: StoredAdapter, places: list[Trainer]
    ) -> tuple[StoredAdapter, types.TrainerAdapter]:
        name, former = stored.adapter.name, stored.trainer
        obstacle: MeshError | None = None
        for trainer in places:
            stored = await self._store.give(stored, trainer.address, now=self._clock())
            self._ownership.note_given(trainer)
            try:
                async with asyncio.timeout(RESTORE_S), self._ownership.call(trainer.address):
                    held = await _begin(trainer.port, stored)
            except TimeoutError:
                obstacle = _hangs(name, trainer.address)
            except Fenced as error:
                raise Unavailable(f"{name} is not free yet: {error}", resource=name) from error
            except (CapacityExhausted, InvalidRequest, NotFound, FailedPrecondition) as error:
                # It may be the trainer's fault, whose blob store is another or not there yet.
                log.warning("%s cannot be restored at %s: %s", name, trainer.address, error)
                obstacle = error
            else:
                self._diverged.discard(name)
                log.info("%s goes from %s to %s", name, former or "nowhere", trainer.address)
                return stored, held
        raise Unavailable(
            f"{name} waits for its trainer at {former}, and no other can take it"
            + (f": {obstacle}" if obstacle else ""),
            resource=name,
        )

    async def _caught_up(self, stored: StoredAdapter, held: types.TrainerAdapter) -> StoredAdapter:
        """Give the trainer the done ops that it lacks, and publish again what was published."""
        name, trainer = stored.adapter.name, self._trainers[stored.trainer]
        published = await self._versions.since(name, held.policy_version)
        self._export_keys[name] = {}
        async with self._ownership.call(stored.trainer):
            await self._publish(stored, trainer, held.policy_version, published)
            for sequence in range(held.next_sequence, stored.adapter.next_sequence):
                op = await self._journal.op(name, sequence)
                try:
                    result = await send(trainer, name, sequence, op, epoch=stored.epoch)
                except _ASTRAY as error:
                    raise Unavailable(f"{name} went astray: {error}", resource=name) from error
                except (InvalidRequest, FailedPrecondition) as error:
                    # A trainer with other limits than the one before; another may take it.
                    log.warning("%s: op %d was done and is refused now: %s", name, sequence, error)
                    self.doubt(name, diverged=True)
                    raise Unavailable(
                        f"{name} cannot be recovered at {stored.trainer}: op {sequence} was done "
                        f"once and is refused there: {error}",
                        resource=name,
                    ) from error
                if not isinstance(result, types.ForwardBackwardResult):
                    await self._publish(stored, trainer, result.policy_version, published)
        self.found(stored)
        return stored

    async def _publish(
        self,
        stored: StoredAdapter,
        trainer: TrainerPort,
        policy_version: int,
        published: Mapping[int, types.PublishedVersion],
    ) -> None:
        if policy_version not in published:
            return
        name = stored.adapter.name
        try:
            # It may have been published while gradients were pending, as they are in a snapshot.
            version = await trainer.publish_adapter(
                name, epoch=stored.epoch, with_pending_gradients=True
            )
        except (*_ASTRAY, FailedPrecondition) as error:
            raise Unavailable(f"{name} went astray: {error}", resource=name) from error
        if version.policy_version != policy_version:
            # An op that was sent before the connection broke has ended only now: look again.
            raise Unavailable(
                f"{name} is at version {version.policy_version} by now, not at {policy_version}",
                resource=name,
            )
        known = published[policy_version]
        if version.digest != known.digest:
            raise await self._given_up(
                stored,
                f"version {policy_version} was published as {known.digest}, and the "
                f"trainer at {stored.trainer} comes to {version.digest}",
            )
        # The trainer before may have died before it had written its own blob.
        if version.export_key != known.export_key:
            await self._versions.move(name, version)
        self._export_keys[name][policy_version] = version.export_key

    async def _given_up(self, stored: StoredAdapter, problem: str) -> FailedPrecondition:
        name = stored.adapter.name
        log.error("%s cannot be recovered: %s", name, problem)
        await self._store.give_up(name, problem)
        return FailedPrecondition(f"{name} cannot be recovered: {problem}", resource=name)

    def _place(self, stored: StoredAdapter) -> tuple[str, int, str]:
        return stored.trainer, stored.epoch, self._ownership.instance(stored.trainer)


def _hangs(name: str, address: str) -> Unavailable:
    return Unavailable(f"{name}: the trainer at {address} does not answer in time", resource=name)


async def send(
    trainer: TrainerPort, adapter: str, sequence: int, op: types.TrainingOp, *, epoch: int
) -> types.TrainingResult:
    """What `trainer` answers to an op."""
    match op:
        case types.ForwardBackward():
            return await trainer.forward_backward(
                adapter, sequence, op.data, op.loss_config, epoch=epoch
            )
        case types.OptimStep():
            return await trainer.optim_step(adapter, sequence, op.adam, epoch=epoch)
        case types.LoadSnapshot():
            return await trainer.load_snapshot(
                adapter, sequence, op.snapshot, with_optimizer=op.with_optimizer, epoch=epoch
            )


async def _begin(trainer: TrainerPort, stored: StoredAdapter) -> types.TrainerAdapter:
    name, epoch = stored.adapter.name, stored.epoch
    if stored.snapshot is not None:
        return await trainer.restore_adapter(name, stored.snapshot, epoch=epoch)
    return await create(trainer, stored)


async def create(trainer: TrainerPort, stored: StoredAdapter) -> types.TrainerAdapter:
    """The adapter as it began, at `trainer`, which is its owner."""
    name, epoch, origin = stored.adapter.name, stored.epoch, stored.origin
    if origin is None:
        return await trainer.create_adapter(name, stored.adapter.lora, epoch=epoch)
    return await trainer.create_adapter(
        name, None, epoch=epoch, fork_of=origin.snapshot, with_optimizer=origin.with_optimizer
    )
