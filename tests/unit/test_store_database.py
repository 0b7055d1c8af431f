"""What the store's database does when its users go away."""

import asyncio
import socket
import sqlite3

import pytest
from sqlalchemy import text

from services.coordinator import store
from services.coordinator.store import database as database_module
from services.coordinator.store.database import _NOTICE, Database, StoreUnavailable

SLOW = text(
    "with recursive n(i) as (select 1 union all select i + 1 from n where i < 300000) "
    "select count(*) from n"
)


async def test_a_user_that_is_cancelled_twice_leaves_no_task_that_hangs(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/x.sqlite")

    async def work(connection):
        begun.set()
        await connection.execute(SLOW)

    before = asyncio.all_tasks()
    for pauses in range(12):
        begun = asyncio.Event()
        user = asyncio.ensure_future(database.transact(work))
        await begun.wait()
        user.cancel()
        for _ in range(pauses):  # the second comes at each moment of what the first led to
            await asyncio.sleep(0)
        user.cancel()
        await asyncio.wait([user])
    async with asyncio.timeout(20):
        while left := asyncio.all_tasks() - before:
            await asyncio.wait(left)
    await database.close()


async def test_what_is_urgent_waits_for_the_write_under_way_and_for_no_other(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/x.sqlite")
    begun, go_on = asyncio.Event(), asyncio.Event()
    written = []

    async def first(_connection):
        begun.set()
        await go_on.wait()

    def write(name):
        async def work(_connection):
            written.append(name)

        return work

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(database.transact(first))
        await begun.wait()
        for number in range(5):
            tasks.create_task(database.transact(write(number)))
        await asyncio.sleep(0)
        tasks.create_task(database.transact(write("urgent"), urgent=True))
        await asyncio.sleep(0)
        go_on.set()
    # The one whose turn is next may have got it before.
    assert written[:2] in (["urgent", 0], [0, "urgent"])
    assert written[2:] == [1, 2, 3, 4]
    await database.close()


async def test_a_server_that_says_nothing_is_unavailable_and_not_waited_for(monkeypatch):
    monkeypatch.setitem(_NOTICE, "connect_timeout", 2)  # the least that the driver knows
    with socket.create_server(("127.0.0.1", 0)) as silent:
        database = Database(f"postgresql://u@127.0.0.1:{silent.getsockname()[1]}/x")
        async with asyncio.timeout(60):
            with pytest.raises(StoreUnavailable):
                async with database.read():
                    pass
        await database.close()


async def test_a_start_waits_for_a_server_that_is_away_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(store, "_AGAIN_S", 0.01)
    tries = []

    async def migrate(_connection):
        tries.append(1)
        if len(tries) < 3:
            raise StoreUnavailable("connection refused")

    monkeypatch.setattr(store, "_migrate_alone", migrate)
    database = Database("postgresql://u@127.0.0.1:1/x")
    monkeypatch.setattr(database, "transact", lambda work: work(None))
    await store._migrated(database)
    assert len(tries) == 3
    assert [record.message for record in caplog.records] == [
        "waits for the database: connection refused"
    ]


async def test_a_start_waits_for_a_file_that_is_locked_and_for_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(database_module, "_BUSY_TIMEOUT_MS", 1)
    monkeypatch.setattr(store, "_AGAIN_S", 0.01)
    path = tmp_path / "x.sqlite"
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("PRAGMA journal_mode = WAL")
    holder.execute("BEGIN IMMEDIATE")
    waited = asyncio.Event()
    monkeypatch.setattr(store.log, "warning", lambda *_: waited.set())

    async def start():
        async with store.open_store(f"sqlite:///{path}", request_retention_s=1.0) as opened:
            return await opened.leadership.read()

    starting = asyncio.create_task(start())
    async with asyncio.timeout(60):
        await waited.wait()
        holder.execute("ROLLBACK")
        assert await starting is None
    holder.close()
    with pytest.raises(StoreUnavailable, match="unable to open"):
        async with store.open_store(f"sqlite:///{tmp_path}", request_retention_s=1.0):
            pass
