"""The journal of training ops: an op's row comes before the op runs, its result before its answer.

Of each adapter the done ops come first, without a gap from where its snapshot ends, and behind them
at most one that is not done: the tail, which was given to a trainer or is about to be. An adapter's
`next_sequence` is that of its done ops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, bindparam, delete, func, insert, select, tuple_, update

from rollmesh.errors import AlreadyExists, FailedPrecondition, Fenced, InvalidRequest, SequenceGap
from services.coordinator.store.adapter_rows import check_free, missing, row_of, stored_of
from services.coordinator.store.tables import adapters, ops

if TYPE_CHECKING:
    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.coordinator.store.adapter_rows import StoredAdapter
    from services.coordinator.store.database import Database

_EXPIRE_AT_ONCE = 500
"""Rows of one transaction: nobody else waits for longer than they take."""


@dataclass(frozen=True, slots=True, eq=False)
class JournaledOp:
    """An op of an adapter. Body and result: as bytes, or as the key of a blob, or gone.

    digest: sha256, hex, of kind and body. snapshot_key: of a LoadSnapshot, what it needs.
    """

    adapter: str
    sequence: int
    kind: str
    digest: str
    body: bytes | None = None
    body_key: str | None = None
    snapshot_key: str | None = None
    done: bool = False
    result: bytes | None = None
    result_key: str | None = None


# Of the statements that every op needs, made once: making them takes as long as running them.
_THIS = (
    ops.c.adapter == bindparam("of_adapter"),
    ops.c.sequence == bindparam("at_sequence"),
)
_AT = select(ops).where(*_THIS)
_INSERT = insert(ops)
_DONE = (
    update(ops)
    .where(*_THIS)
    .values(
        done=True,
        result=bindparam("new_result"),
        result_key=bindparam("new_result_key"),
        done_time=bindparam("now"),
    )
)
_MOVE_ON = (
    update(adapters)
    .where(
        adapters.c.name == bindparam("of_adapter"),
        adapters.c.epoch == bindparam("under_epoch"),
        adapters.c.next_sequence == bindparam("at_sequence"),
    )
    .values(
        next_sequence=bindparam("new_sequence"),
        policy_version=func.coalesce(
            bindparam("new_version", type_=BigInteger), adapters.c.policy_version
        ),
        use_time=bindparam("now"),
    )
)


class OpStore:
    """The table `ops`, and how far each adapter has come by it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, op: JournaledOp, *, job: str) -> JournaledOp | StoredAdapter:
        """What stands in the journal where `op` would: itself, or a tail to settle first.

        Or, where nothing does and `op` may be appended, its adapter.

        Raises:
            NotFound: there is no such adapter.
            FailedPrecondition: a job other than `job` owns it; it cannot be recovered; the op was
                answered and its result is kept no longer.
            AlreadyExists: another op was answered under its sequence.
            SequenceGap: it is not the adapter's next.
        """
        async with self._database.read() as connection:
            return await _find(connection, op, job)

    async def append(self, op: JournaledOp, *, job: str, now: float) -> JournaledOp | StoredAdapter:
        """As `find`; where that is the adapter, `op` is its new tail once this returns."""

        async def work(connection: AsyncConnection) -> JournaledOp | StoredAdapter:
            found = await _find(connection, op, job)
            if not isinstance(found, JournaledOp):
                row = {
                    "adapter": op.adapter,
                    "sequence": op.sequence,
                    "kind": op.kind,
                    "digest": op.digest,
                    "body": op.body,
                    "body_key": op.body_key,
                    "snapshot_key": op.snapshot_key,
                    "done": False,
                    "create_time": now,
                }
                await connection.execute(_INSERT, row)
            return found

        return await self._database.transact(work)

    async def record(
        self,
        op: JournaledOp,
        *,
        epoch: int,
        policy_version: int | None,
        result: bytes | None,
        result_key: str | None,
        now: float,
    ) -> None:
        """The tail is done, as the owner under `epoch` says; policy_version None: as before.

        Raises:
            Fenced: that owner is it no more.
        """
        at = {"of_adapter": op.adapter, "at_sequence": op.sequence}
        moved = {
            **at,
            "under_epoch": epoch,
            "new_sequence": op.sequence + 1,
            "new_version": policy_version,
            "now": now,
        }
        done = {**at, "new_result": result, "new_result_key": result_key, "now": now}

        async def work(connection: AsyncConnection) -> None:
            if not (await connection.execute(_MOVE_ON, moved)).rowcount:
                raise Fenced(f"{op.adapter} is not under epoch {epoch} any more")
            await connection.execute(_DONE, done)

        await self._database.transact(work)

    async def refuse(self, op: JournaledOp) -> None:
        """The tail changed nothing: its sequence is free again."""

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(
                _where(delete(ops), op.adapter, op.sequence).where(ops.c.done.is_(False))
            )

        await self._database.transact(work)

    async def tail(self, adapter: str) -> JournaledOp | None:
        """The op that is not done; None: there is none."""
        query = select(ops).where(ops.c.adapter == adapter, ops.c.done.is_(False))
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return None if row is None else _op_of(row)

    async def tails(self) -> set[str]:
        """The adapters that have a tail."""
        query = select(ops.c.adapter).where(ops.c.done.is_(False))
        async with self._database.read() as connection:
            return set(await connection.scalars(query))

    async def get(self, adapter: str, sequence: int) -> JournaledOp:
        """An op that is in the journal."""
        async with self._database.read() as connection:
            row = await _row_at(connection, adapter, sequence)
        assert row is not None, (adapter, sequence)  # noqa: S101 - no gaps, see above
        return _op_of(row)

    async def expire(self, *, before: float) -> int:
        """Let go of some results older than `before` (Unix seconds) that recovery does not need.

        The newest of each adapter stays. How many they were; 0: there are none left.
        """
        key = (ops.c.adapter, ops.c.sequence)
        old = (
            select(*key)
            .join(adapters, adapters.c.name == ops.c.adapter)
            .where(
                ops.c.done_time < before,
                ops.c.body.is_(None),
                ops.c.body_key.is_(None),
                ops.c.sequence < adapters.c.next_sequence - 1,
            )
            .limit(_EXPIRE_AT_ONCE)
        )

        async def work(connection: AsyncConnection) -> int:
            expired = await connection.execute(delete(ops).where(tuple_(*key).in_(old)))
            return expired.rowcount

        return await self._database.transact(work)


async def _find(
    connection: AsyncConnection, op: JournaledOp, job: str
) -> JournaledOp | StoredAdapter:
    stored = stored_of(await row_of(connection, op.adapter))
    _check_owner(stored, job)
    expected = stored.adapter.next_sequence
    if op.sequence < 1:
        raise InvalidRequest(
            f"sequence: {op.sequence} is not ≥ 1", field="sequence", value=op.sequence
        )
    tail = await _row_at(connection, op.adapter, expected)
    row = tail if op.sequence == expected else await _row_at(connection, op.adapter, op.sequence)
    context = {"resource": op.adapter, "field": "sequence", "value": op.sequence}
    if row is not None and row.done and row.digest != op.digest:
        raise AlreadyExists(
            f"sequence: {op.sequence} of {op.adapter} was another op",
            expected_sequence=expected,
            **context,
        )
    if row is not None and row.done:
        return _op_of(row)
    if op.sequence < expected:
        raise FailedPrecondition(
            f"sequence: {op.sequence} of {op.adapter} was answered and its result is kept no "
            f"longer; expected is {expected}",
            expected_sequence=expected,
            **context,
        )
    if stored.problem:
        raise unrecoverable(stored)
    if tail is not None:
        return _op_of(tail)
    if op.sequence > expected:
        raise SequenceGap(
            f"sequence: {op.sequence} of {op.adapter} leaves a gap, expected is {expected}",
            expected_sequence=expected,
            **context,
        )
    return stored


def unrecoverable(stored: StoredAdapter) -> FailedPrecondition:
    """What using an adapter that has a problem raises."""
    name = stored.adapter.name
    return FailedPrecondition(f"{name} cannot be recovered: {stored.problem}", resource=name)


def _check_owner(stored: StoredAdapter, job: str) -> None:
    name = stored.adapter.name
    if not stored.ready:
        raise missing(name)
    if stored.adapter.job != job:
        check_free(stored)
    if job and not (stored.owned and stored.adapter.job == job):
        raise FailedPrecondition(f"{job} has ended, or does not own {name}", resource=name, job=job)


async def _row_at(connection: AsyncConnection, adapter: str, sequence: int) -> Row[Any] | None:
    found = await connection.execute(_AT, {"of_adapter": adapter, "at_sequence": sequence})
    return found.one_or_none()


def _where(statement: Any, adapter: str, sequence: int) -> Any:
    return statement.where(ops.c.adapter == adapter, ops.c.sequence == sequence)


def _op_of(row: Row[Any]) -> JournaledOp:
    return JournaledOp(
        adapter=row.adapter,
        sequence=row.sequence,
        kind=row.kind,
        digest=row.digest,
        body=row.body,
        body_key=row.body_key,
        snapshot_key=row.snapshot_key,
        done=row.done,
        result=row.result,
        result_key=row.result_key,
    )
