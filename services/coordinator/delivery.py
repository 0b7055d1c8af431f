"""Each op exactly once: journaled, then delivered to its adapter's owner, then its result recorded.

An op that was journaled and whose end nobody knows is the tail. It is delivered again before
anything else happens to its adapter: a trainer answers a repeat with what it answered before.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    Fenced,
    InternalError,
    MeshError,
    NotFound,
    Overloaded,
    SequenceGap,
    Unavailable,
)
from services.coordinator.recovery import send
from services.coordinator.store import JournaledOp

if TYPE_CHECKING:
    from services.coordinator.journal import Journal
    from services.coordinator.ports import TrainerPort
    from services.coordinator.recovery import Recovery
    from services.coordinator.snapshots import Snapshots
    from services.coordinator.store import StoredAdapter

log = logging.getLogger(__name__)

# After these nobody knows whether the op ran: one attempt of the channel may have begun it, and the
# next one have found the trainer full.
_OPEN = (Unavailable, DeadlineExceeded, Fenced, Overloaded)


class Delivery:
    """Ops to the trainers. Every method is to be called in the adapter's turn."""

    def __init__(self, journal: Journal, recovery: Recovery, snapshots: Snapshots) -> None:
        self._journal = journal
        self._recovery = recovery
        self._snapshots = snapshots

    async def train(
        self, adapter: str, sequence: int, op: types.TrainingOp, *, job: str
    ) -> types.TrainingResult:
        """The result of `op`, which runs now or ran before.

        Raises:
            MeshError: as TrainingService says.
        """
        entry = self._journal.entry(adapter, sequence, op)
        while isinstance(found := await self._journal.append(entry, job=job), JournaledOp):
            if found.done:
                return await self._journal.result_of(found)
            await self._settle(found)
        return await self._deliver(entry, op, found)

    async def has_tail(self, adapter: str) -> bool:
        """Whether an op of the adapter is under way, or its end unknown. In no turn."""
        return await self._journal.tail(adapter) is not None

    async def settle(self, adapter: str) -> None:
        """Come to know how the adapter's tail ends, if there is one.

        Raises:
            Unavailable: its trainer is away.
        """
        tail = await self._journal.tail(adapter)
        if tail is not None:
            await self._settle(tail)

    async def _settle(self, tail: JournaledOp) -> None:
        op = await self._journal.op_of(tail)
        try:
            await self._deliver(tail, op, None)
        except MeshError as error:
            if not _refuses(error):
                raise
            log.info("op %d of %s was refused: %s", tail.sequence, tail.adapter, error)

    async def _deliver(
        self, entry: JournaledOp, op: types.TrainingOp, stored: StoredAdapter | None
    ) -> types.TrainingResult:
        """`stored`: of a new op, the adapter as it was read when the op was appended."""
        try:
            stored, result = await self._ask(entry, op, stored)
        except MeshError as error:
            if _refuses(error):
                await self._journal.refuse(entry)
                if isinstance(error, InternalError):
                    # Whatever went wrong there, what it left is not to be trusted.
                    self._recovery.doubt(entry.adapter, diverged=True)
            raise
        await self._journal.record(entry, result, epoch=stored.epoch)
        self._snapshots.note(stored, entry)
        return result

    async def _ask(
        self, entry: JournaledOp, op: types.TrainingOp, read: StoredAdapter | None
    ) -> tuple[StoredAdapter, types.TrainingResult]:
        name = entry.adapter

        async def ask(stored: StoredAdapter, trainer: TrainerPort) -> types.TrainingResult:
            return await send(trainer, name, entry.sequence, op, epoch=stored.epoch)

        try:
            return await self._recovery.call(name, ask, read)
        except NotFound as error:
            if isinstance(op, types.LoadSnapshot):
                raise FailedPrecondition(str(error), **error.context) from error
            raise Unavailable(f"{name} went astray: {error}", resource=name) from error
        except (SequenceGap, AlreadyExists, Fenced) as error:
            raise Unavailable(f"{name} went astray: {error}", resource=name) from error


def _refuses(error: MeshError) -> bool:
    """Whether the op did not run and will not."""
    return not isinstance(error, _OPEN)
