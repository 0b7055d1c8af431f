"""Records and keys in the store, over every database that it promises to work on."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import func, select

from rollmesh import types
from rollmesh.errors import Conflict, NotFound, Overloaded
from services.coordinator.store.tables import records
from tests.contract.test_store import postgresql, store, url

__all__ = ["postgresql", "store", "url"]

MANY = 1000


async def put(
    store, key, value=b"v", *, project="p", expected=None, expire_time=None, most=MANY, now=1.0
):
    return await store.records.put(
        project,
        key,
        value,
        expected_revision=expected,
        expire_time=expire_time,
        max_records=most,
        now=now,
    )


async def page(store, prefix="", *, project="p", now=2.0, **changes):
    asked = {"limit": 100, "offset": 0, "max_bytes": 10**6, "newest_first": False, **changes}
    found, total = await store.records.page(project, prefix, now=now, **asked)
    return [record.key for record in found], total


async def num_records(store) -> int:
    async with store.records._database.read() as connection:
        return (await connection.execute(select(func.count()).select_from(records))).scalar_one()


class TestRecords:
    async def test_what_is_written_is_read_and_each_write_is_a_revision(self, store):
        value = bytes(range(256)) * 1024
        first = await put(store, "sessions/a", value, expire_time=50.0, now=1.0)
        assert first == types.Record("sessions/a", value, 1, 1.0, 50.0)
        assert await store.records.get("p", "sessions/a", now=2.0) == first
        second = await put(store, "sessions/a", b"", now=3.0)
        assert second == types.Record("sessions/a", b"", 2, 1.0, None)
        assert await store.records.get("p", "sessions/a", now=1e9) == second

    @pytest.mark.parametrize("expected", [0, 1, 3])
    async def test_a_write_over_another_revision_changes_nothing(self, store, expected):
        await put(store, "a")
        kept = await put(store, "a", b"kept")
        with pytest.raises(Conflict, match="'a' of projects/p has revision 2") as caught:
            await put(store, "a", b"lost", expected=expected)
        assert caught.value.context == {"resource": "a", "revision": "2"}
        if expected:
            with pytest.raises(Conflict):
                await store.records.delete("p", "a", expected_revision=expected, now=1.0)
        assert await store.records.get("p", "a", now=1.0) == kept
        assert (await put(store, "a", b"new", expected=2)).revision == 3

    async def test_what_is_not_there_has_no_revision(self, store):
        with pytest.raises(Conflict, match="is not there, and expected was revision 1") as caught:
            await put(store, "a", expected=1)
        assert caught.value.context["revision"] == "0"
        assert (await put(store, "a", expected=0)).revision == 1

    @pytest.mark.parametrize("begun", [False, True])
    async def test_of_writers_at_once_that_expect_the_same_exactly_one_wins(self, store, begun):
        for round_ in range(5):
            key, expected = f"k{round_}", 0
            if begun:
                expected = (await put(store, key)).revision
            values = [str(number).encode() for number in range(8)]
            writes = [put(store, key, value, expected=expected) for value in values]
            ended = await asyncio.gather(*writes, return_exceptions=True)
            won = [each for each in ended if isinstance(each, types.Record)]
            assert [type(each) for each in ended if each not in won] == [Conflict] * 7
            assert won == [await store.records.get("p", key, now=1.0)]
            assert won[0].revision == expected + 1

    async def test_of_writers_at_once_that_expect_nothing_every_write_counts(self, store):
        ended = await asyncio.gather(*(put(store, "k", b"%d" % number) for number in range(8)))
        assert sorted(each.revision for each in ended) == list(range(1, 9))
        assert max(ended, key=lambda each: each.revision) == await store.records.get(
            "p", "k", now=1.0
        )

    async def test_what_has_expired_is_gone_at_once_and_begins_anew(self, store):
        await put(store, "a", expire_time=10.0)
        await put(store, "a", expire_time=10.0)
        await put(store, "b")
        assert await page(store, now=9.9) == (["a", "b"], 2)
        assert await page(store, now=10.0) == (["b"], 1)
        with pytest.raises(NotFound, match="projects/p has no record 'a'"):
            await store.records.get("p", "a", now=10.0)
        with pytest.raises(Conflict, match="is not there"):
            await put(store, "a", expected=2, now=10.0)
        await store.records.delete("p", "a", expected_revision=7, now=10.0)
        await put(store, "a", expire_time=10.0)
        again = await put(store, "a", b"new", expected=0, now=11.0)
        assert again == types.Record("a", b"new", 1, 11.0, None)

    async def test_a_record_that_is_deleted_is_gone_and_a_second_time_is_fine(self, store):
        await put(store, "a")
        await put(store, "a", project="q")
        await store.records.delete("p", "a", expected_revision=1, now=1.0)
        await store.records.delete("p", "a", expected_revision=1, now=1.0)
        with pytest.raises(NotFound):
            await store.records.get("p", "a", now=1.0)
        assert await page(store, project="q") == (["a"], 1)

    async def test_those_of_a_prefix_are_told_by_key_or_the_newest_first(self, store):
        keys = ["run/B", "run/a", "run/a/1", "run/~", "run", "ruN/a", "run%", "run_", "s", "run/%"]
        for time, key in enumerate(keys):
            await put(store, key, now=float(time))
        await put(store, "run/other", project="q")
        mine = ["run/%", "run/B", "run/a", "run/a/1", "run/~"]
        assert await page(store, "run/") == (mine, 5)
        assert await page(store, "run/a") == (["run/a", "run/a/1"], 2)
        assert await page(store, "run/%") == (["run/%"], 1)
        assert await page(store, "") == (sorted(keys), len(keys))
        newest = [key for key in reversed(keys) if key in mine]
        assert await page(store, "run/", newest_first=True) == (newest, 5)
        assert await page(store, "run/", newest_first=True, limit=2, offset=1) == (newest[1:3], 5)
        assert await page(store, "run/", limit=2, offset=4) == (mine[4:], 5)
        assert await page(store, "run/", offset=2**62) == ([], 5)
        assert await page(store, "none") == ([], 0)

    @pytest.mark.parametrize(
        ("offset", "told"),
        [
            pytest.param(0, ["a", "b"], id="as many as fit"),
            pytest.param(2, ["c"], id="one that alone is too large"),
            pytest.param(3, ["d"], id="what is left"),
        ],
    )
    async def test_a_page_ends_before_its_values_are_too_many_bytes(self, store, offset, told):
        for key, length in {"a": 5, "b": 5, "c": 11, "d": 10}.items():
            await put(store, key, b"x" * length)
        assert await page(store, max_bytes=10, offset=offset) == (told, 4)

    async def test_one_more_than_a_project_may_have_is_refused(self, store):
        await put(store, "a", most=3, expire_time=10.0)
        await put(store, "b", most=3)
        await put(store, "c", most=3)
        await put(store, "d", most=3, project="q")
        with pytest.raises(Overloaded, match="projects/p has 3 records, which is max_records"):
            await put(store, "d", most=3)
        await put(store, "c", b"a change is no more", most=3)
        await put(store, "d", most=3, now=10.0)
        with pytest.raises(Overloaded):
            await put(store, "e", most=3, now=10.0)
        await store.records.delete("p", "b", expected_revision=None, now=10.0)
        await put(store, "e", most=3, now=10.0)

    async def test_many_at_once_are_not_one_more_than_a_project_may_have(self, store):
        writes = [put(store, f"k{number}", most=3) for number in range(10)]
        ended = await asyncio.gather(*writes, return_exceptions=True)
        assert sum(isinstance(each, Overloaded) for each in ended) == 7
        assert await num_records(store) == 3

    async def test_what_has_expired_is_deleted_in_small_transactions(self, store, monkeypatch):
        monkeypatch.setattr("services.coordinator.store.records.MAX_EXPIRED", 2)
        for number in range(5):
            await put(store, f"k{number}", expire_time=10.0)
        await put(store, "later", expire_time=10.1)
        await put(store, "never")
        assert [await store.records.expire(now=10.0) for _ in range(4)] == [2, 2, 1, 0]
        assert await num_records(store) == 2


def key_of(number, *, project="p", time=1.0):
    return types.Key(f"projects/{project}/keys/k{number}", f"for {number}", "tml-abcd", time)


class TestKeys:
    async def test_a_key_is_found_by_its_hash_alone_until_it_is_deleted(self, store):
        await store.keys.create(key_of(1), "a" * 64, max_keys=9)
        await store.keys.create(key_of(2, project="q"), "b" * 64, max_keys=9)
        assert await store.keys.find("a" * 64) == key_of(1)
        assert await store.keys.find("b" * 64) == key_of(2, project="q")
        assert await store.keys.find("c" * 64) is None
        await store.keys.delete(key_of(1).name)
        assert await store.keys.find("a" * 64) is None
        with pytest.raises(NotFound, match="there is no projects/p/keys/k1"):
            await store.keys.delete(key_of(1).name)

    async def test_those_of_a_project_are_told_the_oldest_first(self, store):
        for number, time in ((3, 1.0), (1, 2.0), (2, 2.0)):
            await store.keys.create(key_of(number, time=time), str(number) * 64, max_keys=9)
        await store.keys.create(key_of(4, project="q"), "4" * 64, max_keys=9)
        assert [key.name[-1] for key in await store.keys.of_project("p")] == ["3", "1", "2"]
        assert await store.keys.of_project("nobody") == []

    async def test_many_at_once_are_not_one_more_than_a_project_may_have(self, store):
        makes = [store.keys.create(key_of(n), str(n) * 64, max_keys=3) for n in range(8)]
        ended = await asyncio.gather(*makes, return_exceptions=True)
        (said,) = {str(each) for each in ended if isinstance(each, Overloaded)}
        assert said == "projects/p has 3 keys, which is max_keys"
        assert len(await store.keys.of_project("p")) == 3
        await store.keys.create(key_of(9, project="q"), "9" * 64, max_keys=3)
