"""The journal's entries, to and from what they mean; what is large of them is in the blob store.

A blob is written before the row that refers to it, so a row never refers to nothing. A blob whose
row did not come to be is the sweeper's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from typing import TYPE_CHECKING, cast

from rollmesh import types
from rollmesh.errors import NotFound, Unavailable
from services.coordinator.bodies import MAX_ROW_BYTES, Bodies
from services.coordinator.store import JournaledOp

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh.blobs import Blobs
    from services.coordinator.ports import OpCodec, OpKind
    from services.coordinator.store import OpStore, StoredAdapter

log = logging.getLogger(__name__)


class Journal:
    """Reads and writes entries.

    Args:
        ops: the rows.
        blobs: what is large.
        codec: ops and results to bytes and back; equal ops give equal bytes.
        clock: Unix seconds.
        new_id: 32 hexadecimal digits that were never used.
    """

    def __init__(
        self,
        ops: OpStore,
        blobs: Blobs,
        codec: OpCodec,
        *,
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self._ops = ops
        self._bodies = Bodies(blobs, "ops", new_id=new_id)
        self._codec = codec
        self._clock = clock

    def entry(self, adapter: str, sequence: int, op: types.TrainingOp) -> JournaledOp:
        """The entry of an op, which `append` may put into the journal."""
        kind, body = self._codec.op_to_bytes(op)
        key = op.snapshot.key if isinstance(op, types.LoadSnapshot) else None
        return JournaledOp(adapter, sequence, kind, _digest(kind, body), body, snapshot_key=key)

    async def append(self, entry: JournaledOp, *, job: str) -> JournaledOp | StoredAdapter:
        """Make `entry` the tail of its adapter, which this then answers.

        Else what stands in its place: itself, or a tail to settle first. Errors as OpStore.find.
        """
        body = entry.body or b""
        if len(body) > MAX_ROW_BYTES:
            found = await self._ops.find(entry, job=job)
            if isinstance(found, JournaledOp):
                return found
            row_body, key = await self._bodies.put(body)
            entry = dataclasses.replace(entry, body=row_body, body_key=key)
        return await self._ops.append(entry, job=job, now=self._clock())

    async def record(self, entry: JournaledOp, result: types.TrainingResult, *, epoch: int) -> None:
        """The tail is done. Fenced: the trainer under `epoch` is not its owner any more."""
        body, key = await self._bodies.put(self._codec.result_to_bytes(result))
        await self._ops.record(
            entry,
            epoch=epoch,
            policy_version=(
                None if isinstance(result, types.ForwardBackwardResult) else result.policy_version
            ),
            result=body,
            result_key=key,
            now=self._clock(),
        )

    async def refuse(self, entry: JournaledOp) -> None:
        """The tail was refused: its sequence is free again."""
        await self._ops.refuse(entry)

    async def tail(self, adapter: str) -> JournaledOp | None:
        """The op that is not done; None: there is none."""
        return await self._ops.tail(adapter)

    async def op(self, adapter: str, sequence: int) -> types.TrainingOp:
        """An op that no snapshot contains."""
        return await self.op_of(await self._ops.get(adapter, sequence))

    async def op_of(self, entry: JournaledOp) -> types.TrainingOp:
        """What is to be done.

        Raises:
            Unavailable: the blob store does not have it, or something else.
        """
        try:
            body = await self._bodies.get(entry.body, entry.body_key)
        except NotFound as error:
            raise _not_as_written(entry) from error
        if _digest(entry.kind, body) != entry.digest:
            raise _not_as_written(entry)
        return self._codec.op_from_bytes(_kind(entry), body)

    async def result_of(self, entry: JournaledOp) -> types.TrainingResult:
        """What a done op answered."""
        body = await self._bodies.get(entry.result, entry.result_key)
        return self._codec.result_from_bytes(_kind(entry), body)


def _digest(kind: str, body: bytes) -> str:
    digest = hashlib.sha256(kind.encode())
    digest.update(body)
    return digest.hexdigest()


def _not_as_written(entry: JournaledOp) -> Unavailable:
    log.error("op %d of %s is not in the blob store as written", entry.sequence, entry.adapter)
    return Unavailable(
        f"op {entry.sequence} of {entry.adapter} is not in the blob store as it was written",
        resource=entry.adapter,
    )


def _kind(entry: JournaledOp) -> OpKind:
    return cast("OpKind", entry.kind)
