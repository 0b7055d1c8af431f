"""Work that was taken: its row comes before it is answered, its result before anybody hears of it.

Of each queue the done positions come first, without a gap from 0. The last of them stays when it is
old, without its result: it is how the queue knows where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, delete, exists, func, insert, or_, select, update

from rollmesh.errors import AlreadyExists, FailedPrecondition, Overloaded
from services.coordinator.store.database import serialize
from services.coordinator.store.tables import futures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.coordinator.store.database import Database

_EXPIRE_AT_ONCE = 500
"""Rows of one transaction: nobody else waits for longer than they take."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredFuture:
    """Work and what came of it. Body and result: as bytes, or as the key of a blob, or gone.

    `queue` "": none. digest: sha256, hex, of the body. `adapter`: that it trains, or empty.
    `sequence`: what that op was given before it was first tried. Times: Unix seconds.
    """

    name: str
    project: str
    queue: str
    position: int
    digest: str
    adapter: str
    create_time: float
    body: bytes | None = None
    body_key: str | None = None
    sequence: int | None = None
    done: bool = False
    result: bytes | None = None
    result_key: str | None = None
    done_time: float | None = None


class FutureStore:
    """The table `futures`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, name: str) -> StoredFuture | None:
        """One of them; None: there is none of that name."""
        async with self._database.read() as connection:
            return await _get(connection, name)

    async def find(self, future: StoredFuture, *, max_unfinished: int) -> StoredFuture | None:
        """What was created before with the name of `future`; None: it may be created.

        Raises:
            AlreadyExists: the name, or the position of the queue, is taken by other work.
            FailedPrecondition: the position was done so long ago that it is not known how.
            Overloaded: its project has `max_unfinished` that are not done, and none of them waits
                for it in its queue.
        """
        async with self._database.read() as connection:
            return await _find(connection, future, max_unfinished)

    async def create(self, future: StoredFuture, *, max_unfinished: int) -> StoredFuture:
        """`future`, once it is written down; or what was before, and errors, as `find`."""

        async def work(connection: AsyncConnection) -> StoredFuture:
            # Else two who come at the same time would both find the last place.
            await serialize(connection, f"futures {future.project}")
            found = await _find(connection, future, max_unfinished)
            if found is not None:
                return found
            await connection.execute(
                insert(futures).values(
                    name=future.name,
                    project=future.project,
                    queue=future.queue or None,
                    position=future.position,
                    digest=future.digest,
                    adapter=future.adapter or None,
                    body=future.body,
                    body_key=future.body_key,
                    done=False,
                    create_time=future.create_time,
                )
            )
            return future

        return await self._database.transact(work)

    async def next_position(self, project: str, queue: str) -> int:
        """The position of a queue that is to be done next, whether it has come or not."""
        async with self._database.read() as connection:
            return await _next_position(connection, project, queue)

    async def next(self, project: str, queue: str) -> StoredFuture | None:
        """What is to be done next in a queue; None: it has not come."""
        async with self._database.read() as connection:
            position = await _next_position(connection, project, queue)
            return await _at(connection, project, queue, position)

    async def has(self, project: str, queue: str, position: int) -> bool:
        """Whether that position of a queue has come."""
        async with self._database.read() as connection:
            return await _at(connection, project, queue, position) is not None

    async def assign(self, name: str, sequence: int) -> None:
        """Write down which sequence a training op is tried with."""

        async def work(connection: AsyncConnection) -> None:
            values = update(futures).where(futures.c.name == name).values(sequence=sequence)
            await connection.execute(values)

        await self._database.transact(work)

    async def finish(
        self, name: str, result: bytes | None, result_key: str | None, *, now: float
    ) -> None:
        """It is done: from now on its body is not needed."""
        values = {
            "done": True,
            "body": None,
            "body_key": None,
            "result": result,
            "result_key": result_key,
            "done_time": now,
        }

        async def work(connection: AsyncConnection) -> None:
            undone = update(futures).where(futures.c.name == name, futures.c.done.is_(False))
            await connection.execute(undone.values(values))

        await self._database.transact(work)

    async def unfinished(self) -> Sequence[tuple[str, str, str]]:
        """Project, queue ("": none) and name of whatever is not done, in order of creation."""
        columns = (futures.c.project, futures.c.queue, futures.c.name)
        query = select(*columns).where(futures.c.done.is_(False)).order_by(futures.c.create_time)
        async with self._database.read() as connection:
            found = await connection.execute(query)
            return [(row.project, row.queue or "", row.name) for row in found]

    async def training(self) -> dict[str, str]:
        """Of each adapter that one of them may be training, the future's name."""
        query = select(futures.c.adapter, futures.c.name).where(
            futures.c.done.is_(False), futures.c.sequence.is_not(None)
        )
        async with self._database.read() as connection:
            return {row.adapter: row.name for row in await connection.execute(query)}

    async def expire(self, *, done_before: float, forget_before: float) -> int:
        """Let go of some of what was done before a time, in Unix seconds; how many; 0: no more.

        Where a queue has come to is remembered until it has stood still since `forget_before`; what
        was taken before that and waits in a queue to this day is given up.
        """
        later = futures.alias()
        followed = exists().where(
            later.c.project == futures.c.project,
            later.c.queue == futures.c.queue,
            later.c.position == futures.c.position + 1,
            later.c.done,
        )
        gone = and_(
            futures.c.done,
            futures.c.done_time < done_before,
            or_(futures.c.queue.is_(None), followed, futures.c.done_time < forget_before),
        )
        stuck = and_(
            futures.c.done.is_(False),
            futures.c.create_time < forget_before,
            futures.c.queue.is_not(None),
        )
        stripped = and_(
            futures.c.done,
            futures.c.done_time < done_before,
            or_(futures.c.result.is_not(None), futures.c.result_key.is_not(None)),
        )

        def some(condition: Any) -> Any:
            return futures.c.name.in_(
                select(futures.c.name).where(condition).limit(_EXPIRE_AT_ONCE)
            )

        async def work(connection: AsyncConnection) -> int:
            count = 0
            for condition in (gone, stuck):
                deleted = await connection.execute(delete(futures).where(some(condition)))
                count += deleted.rowcount
            emptied = update(futures).where(some(stripped)).values(result=None, result_key=None)
            return count + (await connection.execute(emptied)).rowcount

        return await self._database.transact(work)


def too_many_futures(project: str, count: int, allowed: int) -> Overloaded:
    """A project has as many unfinished futures as it may."""
    return Overloaded(
        f"projects/{project} has {count} futures that are not done, which is max_futures",
        resource=f"projects/{project}",
        value=count,
        allowed=allowed,
    )


def future_taken(name: str) -> AlreadyExists:
    """The name of a future is another's."""
    return AlreadyExists(f"there is another {name}", resource=name, field="name", value=name)


async def _find(
    connection: AsyncConnection, future: StoredFuture, max_unfinished: int
) -> StoredFuture | None:
    found = await _get(connection, future.name)
    if found is not None:
        if _identity(found) != _identity(future):
            raise future_taken(future.name)
        return found
    if not future.queue:
        await _check_room(connection, future, max_unfinished, is_awaited=False)
        return None
    place = future.project, future.queue
    other = await _at(connection, *place, future.position)
    context = {"resource": future.name, "field": "position", "value": future.position}
    if other is not None:
        raise AlreadyExists(
            f"position: {future.position} of queue {future.queue!r} is taken by {other.name}",
            **context,
        )
    expected = await _next_position(connection, *place)
    if future.position < expected:
        raise FailedPrecondition(
            f"position: {future.position} of queue {future.queue!r} was done and is kept no "
            f"longer; next is {expected}",
            **context,
        )
    is_next = future.position == expected
    await _check_room(connection, future, max_unfinished, is_awaited=is_next)
    return None


async def _check_room(
    connection: AsyncConnection, future: StoredFuture, max_unfinished: int, *, is_awaited: bool
) -> None:
    unfinished = select(func.count()).where(
        futures.c.project == future.project, futures.c.done.is_(False)
    )
    count = (await connection.execute(unfinished)).scalar_one()
    if count < max_unfinished:
        return
    # What others wait for comes in all the same: else they would wait for it, and it for them. It
    # is one for each queue, at most as many again.
    behind = unfinished.where(futures.c.queue == future.queue)
    if not is_awaited or not (await connection.execute(behind)).scalar_one():
        raise too_many_futures(future.project, count, max_unfinished)


def _identity(future: StoredFuture) -> tuple[object, ...]:
    return future.queue, future.position, future.digest


async def _get(connection: AsyncConnection, name: str) -> StoredFuture | None:
    found = await connection.execute(select(futures).where(futures.c.name == name))
    return _future_of(found.one_or_none())


async def _at(
    connection: AsyncConnection, project: str, queue: str, position: int
) -> StoredFuture | None:
    found = await connection.execute(
        select(futures).where(*_of(project, queue), futures.c.position == position)
    )
    return _future_of(found.one_or_none())


async def _next_position(connection: AsyncConnection, project: str, queue: str) -> int:
    # From the end: what is not done is few, and what is done may be many.
    last = (
        select(futures.c.position)
        .where(*_of(project, queue), futures.c.done)
        .order_by(futures.c.position.desc())
        .limit(1)
    )
    found = (await connection.execute(last)).scalar_one_or_none()
    return 0 if found is None else int(found) + 1


def _of(project: str, queue: str) -> tuple[Any, Any]:
    return futures.c.project == project, futures.c.queue == queue


def _future_of(row: Row[Any] | None) -> StoredFuture | None:
    if row is None:
        return None
    return StoredFuture(
        name=row.name,
        project=row.project,
        queue=row.queue or "",
        position=row.position,
        digest=row.digest,
        adapter=row.adapter or "",
        create_time=row.create_time,
        body=row.body,
        body_key=row.body_key,
        sequence=row.sequence,
        done=row.done,
        result=row.result,
        result_key=row.result_key,
        done_time=row.done_time,
    )
