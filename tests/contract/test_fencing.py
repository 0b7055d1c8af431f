"""Only the leader writes, on every database that the store promises to work on."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from sqlalchemy import insert, select, update

from services.coordinator.store import Deposed, Leader, LeadershipStore, open_store
from services.coordinator.store.database import Database, StoreUnavailable
from services.coordinator.store.tables import leadership, usage
from tests.fakes.databases import emptied, postgresql_server


@pytest.fixture(scope="module")
def postgresql():
    with postgresql_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request, tmp_path):
    """Of a database with tables and nothing in them."""
    if request.param == "sqlite":
        made = f"sqlite:///{tmp_path}/store.sqlite"
    else:
        made = await emptied(request.getfixturevalue("postgresql"), "fencing")
    async with open_store(made, request_retention_s=1.0):
        pass
    return made


class Process:
    """A coordinator's ways to the database."""

    def __init__(self, url, name):
        self.database = Database(url, silence_s=1.0)
        # As open_store does it.
        self.renewing = Database(url, silence_s=1.0) if self.database.is_server else self.database
        self.leadership = LeadershipStore(self.renewing)
        self.name = name
        self.deposed = 0

    async def take(self):
        epoch = await self.leadership.take(
            await self.leadership.read(), holder=self.name, address=f"{self.name}:1"
        )
        assert epoch is not None
        self.database.lead(epoch, self._note)
        return epoch

    def _note(self):
        self.deposed += 1

    async def write(self, day, held=None, begun=None):
        async def work(connection):
            await connection.execute(
                insert(usage).values(project="p", day=day, prompt_tokens=0, drawn_tokens=0)
            )
            if begun:
                begun.set()
                await held.wait()

        await self.database.transact(work)

    async def written(self):
        async with self.database.read() as connection:
            return set(await connection.scalars(select(usage.c.day)))

    async def close(self):
        await self.database.close()
        await self.renewing.close()


@pytest.fixture
async def both(url):
    one, other = Process(url, "a"), Process(url, "b")
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(one.close)
        stack.push_async_callback(other.close)
        yield one, other


async def test_the_row_says_who_leads_and_only_who_saw_it_as_it_is_takes_over(both):
    one, other = (each.leadership for each in both)
    assert await one.read() is None
    assert await one.take(None, holder="a", address="a:1") == 1
    seen = await other.read()
    assert seen == Leader("a", 1, 0, "a:1")
    assert await one.renew(1)
    assert await other.take(seen, holder="b", address="b:1") is None
    assert await other.take(await other.read(), holder="b", address="b:1") == 2
    assert not await one.renew(1)
    await one.give_up(1)  # which is no longer his to give
    assert (await other.read()).holder == "b"
    await other.give_up(2)
    assert (await one.read()).holder == ""


async def test_of_two_that_take_over_at_once_one_leads(both):
    for epoch in range(1, 6):
        seen = await both[0].leadership.read()
        took = await asyncio.gather(
            *(each.leadership.take(seen, holder=each.name, address="") for each in both)
        )
        assert sorted(took, key=str) == [epoch, None]


async def test_a_deposed_leader_writes_nothing_and_is_told(both):
    one, other = both
    await one.take()
    await one.write(1)
    await other.take()
    with pytest.raises(Deposed):
        await one.write(2)
    await other.write(3)
    assert await other.written() == {1, 3}
    assert (one.deposed, other.deposed) == (1, 0)


async def test_a_takeover_waits_for_what_the_leader_writes_and_cuts_off_what_comes_later(both):
    one, other = both
    await one.take()
    begun, held = asyncio.Event(), asyncio.Event()
    writing = asyncio.create_task(one.write(1, held, begun))
    await begun.wait()
    taking = asyncio.create_task(other.take())
    # Neither is done before the other: the write is seen by the one who leads next.
    done, _ = await asyncio.wait({taking}, timeout=0.2)
    assert not done
    held.set()
    await writing
    await taking
    assert await other.written() == {1}
    with pytest.raises(Deposed):
        await one.write(2)


async def test_a_write_that_begins_while_another_takes_over_waits_and_is_refused(both):
    one, other = both
    await one.take()
    taken, held = asyncio.Event(), asyncio.Event()

    async def take(connection):
        await connection.execute(select(leadership.c.epoch).with_for_update())
        await connection.execute(update(leadership).values(epoch=2))
        taken.set()
        await held.wait()

    taking = asyncio.create_task(other.renewing.transact(take))
    await taken.wait()
    writing = asyncio.create_task(one.write(1))
    done, _ = await asyncio.wait({writing}, timeout=0.2)
    assert not done
    held.set()
    await taking
    with pytest.raises(Deposed):
        await writing
    assert await other.written() == set()


async def test_a_leader_renews_while_its_writes_are_under_way(both):
    one, _ = both
    if not one.database.is_server:
        pytest.skip("there writers take turns")
    await one.take()
    begun, held = asyncio.Event(), asyncio.Event()
    writing = asyncio.create_task(one.write(1, held, begun))
    await begun.wait()
    async with asyncio.timeout(20):
        assert await one.leadership.renew(1)
    held.set()
    await writing


async def test_a_leader_that_stalls_within_a_write_is_hung_up_on_and_succeeded(both):
    one, other = both
    if not one.database.is_server:
        pytest.skip("a file's lock is its process's for as long as that lives")
    await one.take()
    begun, held = asyncio.Event(), asyncio.Event()
    writing = asyncio.create_task(one.write(1, held, begun))
    await begun.wait()
    taking = asyncio.create_task(other.take())
    taken, _ = await asyncio.wait({taking}, timeout=20)
    held.set()
    await asyncio.wait({writing, taking})
    assert taken
    with pytest.raises(StoreUnavailable):
        writing.result()
    assert await other.written() == set()


async def test_databases_that_nobody_leads_may_be_written_by_all(both):
    one, other = both
    await one.write(1)
    await other.write(2)
    assert await one.written() == {1, 2}


async def test_several_that_start_at_once_on_an_empty_database_all_find_their_tables(
    tmp_path, request
):
    urls = [f"sqlite:///{tmp_path}/new.sqlite"]
    with contextlib.suppress(pytest.skip.Exception):
        urls.append(await emptied(request.getfixturevalue("postgresql"), "new"))

    async def start(url):
        async with open_store(url, request_retention_s=1.0) as store:
            return await store.leadership.read()

    for url in urls:
        assert await asyncio.gather(*(start(url) for _ in range(4))) == [None] * 4
