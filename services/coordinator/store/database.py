"""One database behind one engine: transactions, and what each dialect needs to keep its promises.

No other module of the store knows which database it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import aiosqlite
from sqlalchemy import event, func, make_url, select
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import create_async_engine

from rollmesh.errors import InvalidRequest, NotLeader, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator

    from sqlalchemy import URL, Connection
    from sqlalchemy.ext.asyncio import AsyncConnection

Result = TypeVar("Result")

_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg"}
_BUSY_TIMEOUT_MS = 10_000
_NOTICE = {
    "connect_timeout": 5,
    "tcp_user_timeout": 5_000,
    "keepalives_idle": 5,
    "keepalives_interval": 1,
}
"""Without these a server that lost its power is noticed after minutes, or never."""
_EPOCH = "SELECT epoch FROM leadership"
_EPOCH_LOCKED = f"{_EPOCH} FOR KEY SHARE"


class StoreUnavailable(Unavailable):
    """The database is away, locked for too long, or full: nothing was changed."""

    is_locked = False


class Deposed(StoreUnavailable):
    """Another coordinator leads by now: nothing was changed."""

    reason = NotLeader.reason


def check_url(text: str) -> URL:
    """The URL of a database that the store can use, with the driver it uses.

    Raises:
        InvalidRequest: not a URL, or of another database.
    """
    try:
        url = make_url(text)
    except ArgumentError:
        url = None
    if url is None or url.get_backend_name() not in _DRIVERS:
        raise InvalidRequest(
            f"database: not a URL of the form sqlite:///FILE or postgresql://USER@HOST/NAME: "
            f"{text!r}",
            field="database",
            value=text,
        )
    return url.set(drivername=_DRIVERS[url.get_backend_name()])


class Database:
    """Transactions on the database at `url`.

    A server ends a transaction whose user says nothing for `silence_s`: what it has locked holds up
    others, and its user may be gone without a word.
    """

    def __init__(self, url: str, *, silence_s: float = 5.0) -> None:
        checked = check_url(url)
        self.is_server = is_server = checked.get_backend_name() != "sqlite"
        # A file does not go away between two transactions, as a server may.
        settings: dict[str, Any] = {"pool_pre_ping": is_server}
        if is_server:
            silence = f"-c idle_in_transaction_session_timeout={round(silence_s * 1000)}"
            settings["connect_args"] = {"options": silence, **_NOTICE}
        else:
            settings["async_creator"] = partial(_connect_to_sqlite, checked.database or "")
        self._engine = create_async_engine(checked, **settings)
        self._reader = self._engine.execution_options(read_only=True)
        self._turn: contextlib.AbstractAsyncContextManager[object] = contextlib.nullcontext()
        self._line: contextlib.AbstractAsyncContextManager[object] = contextlib.nullcontext()
        # Under what epoch this process leads, and whom to tell that it does not. None: all write.
        self._fence: tuple[int, Callable[[], None]] | None = None
        if not is_server:
            Path(checked.database or "").parent.mkdir(parents=True, exist_ok=True)
            # It lets in one writer at a time and has the others sleep and try again. Here they
            # queue up instead, and the first in the line waits for its turn.
            self._turn, self._line = asyncio.Lock(), asyncio.Lock()
            event.listen(self._engine.sync_engine, "connect", _prepare_sqlite)
            event.listen(self._engine.sync_engine, "begin", _begin_sqlite)

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection for reading alone."""
        with _errors():
            async with self._reader.connect() as connection:
                yield connection

    def lead(self, epoch: int, deposed: Callable[[], None]) -> None:
        """Write from now on only while `leadership` says this epoch; `deposed` hears that not."""
        self._fence = epoch, deposed

    async def transact(
        self, work: Callable[[AsyncConnection], Awaitable[Result]], *, urgent: bool = False
    ) -> Result:
        """What `work` answers, once all that it wrote is durable; if it raises, nothing is.

        Whoever is cancelled meanwhile is so when it has ended: a driver that is left alone in the
        middle of a transaction may keep its locks.

        It runs once more where another writer took the same key between its look and its insert:
        the second look sees that.

        What is `urgent` waits for no more than the transaction under way: a lease must not end
        because many others have something to write.

        Raises:
            Deposed: see `lead`.
        """
        with _errors():
            async with contextlib.nullcontext() if urgent else self._line, self._turn:
                return await _to_its_end(self._transact(work))

    async def _transact(self, work: Callable[[AsyncConnection], Awaitable[Result]]) -> Result:
        try:
            return await self._fenced(work)
        except IntegrityError:
            return await self._fenced(work)

    async def _fenced(self, work: Callable[[AsyncConnection], Awaitable[Result]]) -> Result:
        async with self._engine.begin() as connection:
            if self._fence is not None:
                await self._check(connection, *self._fence)
            return await work(connection)

    async def _check(
        self, connection: AsyncConnection, epoch: int, deposed: Callable[[], None]
    ) -> None:
        # Whoever takes over waits for the end of this transaction, and those that come later see
        # the new epoch. A mere renewal, which changes no key, waits for nobody.
        query = _EPOCH_LOCKED if self.is_server else _EPOCH
        found = await connection.exec_driver_sql(query)
        if found.scalar_one_or_none() != epoch:
            deposed()
            raise Deposed("another coordinator leads by now")

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()


async def serialize(connection: AsyncConnection, key: str) -> None:
    """Until the transaction of `connection` has ended, no other gets past here with this `key`."""
    # SQLite has one writer at a time as it is.
    if connection.dialect.name == "postgresql":
        number = func.hashtextextended(key, 0)
        await connection.execute(select(func.pg_advisory_xact_lock(number)))


async def _to_its_end(work: Coroutine[Any, Any, Result]) -> Result:
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (DBAPIError, PoolTimeoutError) as error:
        # A server that hangs up does so with errors of several kinds.
        if isinstance(error, DBAPIError) and not (
            isinstance(error, OperationalError) or error.connection_invalidated
        ):
            raise
        cause = getattr(error, "orig", None) or error
        away = StoreUnavailable(f"the coordinator's database does not answer: {cause}")
        code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_OK)
        away.is_locked = code & 0xFF == sqlite3.SQLITE_BUSY
        raise away from error


class _SqliteConnection(aiosqlite.Connection):
    """What waits for a lock or for the disk is done in the connection's thread, and nothing else.

    A small transaction needs a dozen calls, and each way to the thread and back takes longer than
    what is done there. So between BEGIN IMMEDIATE and COMMIT, when the lock is held, calls are made
    at once. Reading goes through the thread: it may be long.
    """

    _in_write = False

    async def _execute(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        begins = args[:1] == (_BEGIN_WRITE,)
        ends = fn in {self._conn.commit, self._conn.rollback, self._conn.close}
        if (self._in_write and not ends) or (ends and self._is_idle(fn)):
            return fn(*args, **kwargs)
        if begins and self._begin_at_once(fn, *args):
            return None
        self._in_write = False
        result = await super()._execute(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        self._in_write = begins
        return result

    def _begin_at_once(self, fn: Any, *args: Any) -> bool:
        """Begin writing if nobody else does: nearly always, as writers here queue up."""
        self._conn.execute("PRAGMA busy_timeout = 0")
        try:
            fn(*args)
        except sqlite3.OperationalError:
            return False
        finally:
            self._conn.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
        self._in_write = True
        return True

    def _is_idle(self, fn: Any) -> bool:
        """Whether `fn` rolls nothing back, as a connection does on its way to the pool."""
        return fn == self._conn.rollback and not self._conn.in_transaction

    def stop(self) -> asyncio.Future[Any] | None:
        """End the thread; None: it was told before.

        SQLAlchemy stops a connection that it is closing where its user is cancelled twice.
        aiosqlite would then wait for an answer of its thread, which has ended, and no cancellation
        would get it out of there.
        """
        return super().stop() if self._running else None


_BEGIN_WRITE = "BEGIN IMMEDIATE"


async def _connect_to_sqlite(path: str) -> aiosqlite.Connection:
    # Calls come from two threads, never at the same time: each is awaited before the next.
    connection = _SqliteConnection(
        lambda: sqlite3.connect(path, check_same_thread=False), iter_chunk_size=64
    )
    thread = connection._thread  # noqa: SLF001 - as SQLAlchemy does with one of its own
    thread.daemon = True
    try:
        return await connection
    except BaseException:
        # It ends, and says so to this loop, which may be closed as soon as this is told.
        await asyncio.to_thread(thread.join)
        raise


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # The driver would begin transactions at the first write only: `_begin_sqlite` does it instead.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes the lock before its first look. One that looked first could find the database
    # changed since, and SQLite then refuses at once, whatever the time-out.
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else _BEGIN_WRITE)
