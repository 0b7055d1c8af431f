"""Futures in the store, over every database that it promises to work on."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib

import pytest

from rollmesh.errors import AlreadyExists, FailedPrecondition, Overloaded
from services.coordinator.store import StoredFuture
from services.coordinator.store import futures as rows
from tests.contract.test_store import postgresql, store, url

__all__ = ["postgresql", "store", "url"]


def future(name, *, queue="q", position=0, body=b"work", project="p", adapter="", now=1.0):
    return StoredFuture(
        name=f"projects/{project}/futures/{name}",
        project=project,
        queue=queue,
        position=position,
        digest=hashlib.sha256(body).hexdigest(),
        adapter=adapter,
        create_time=now,
        body=body,
    )


async def create(store, name, *, most=1000, **values):
    return await store.futures.create(future(name, **values), max_unfinished=most)


async def finish(store, *names, now=10.0, key=None):
    for name in names:
        result = None if key else b"result"
        await store.futures.finish(f"projects/p/futures/{name}", result, key, now=now)


async def names(store, *candidates):
    found = [await store.futures.get(f"projects/p/futures/{name}") for name in candidates]
    return [one.name.rpartition("/")[2] for one in found if one]


async def until_none(store, **times):
    counts = []
    while not counts or counts[-1]:
        counts.append(await store.futures.expire(**times))
    return counts


class TestCreating:
    async def test_what_is_created_is_as_it_was_given(self, store):
        given = future("a", position=3, body=b"\x00\xff", adapter="projects/p/adapters/a")
        await store.futures.create(given, max_unfinished=1)
        found = await store.futures.get(given.name)
        assert dataclasses.asdict(found) == dataclasses.asdict(given)

    async def test_a_repeat_answers_what_was_first_and_adds_nothing(self, store):
        await create(store, "a", now=1.0)
        again = await create(store, "a", now=2.0, most=1)
        assert again.create_time == 1.0
        assert len(await store.futures.unfinished()) == 1

    @pytest.mark.parametrize(
        ("name", "changed"),
        [
            ("a", {"body": b"other"}),
            ("a", {"position": 1}),
            ("a", {"queue": "other"}),
            ("b", {}),
        ],
    )
    async def test_names_and_places_are_taken_once(self, store, name, changed):
        await create(store, "a")
        with pytest.raises(AlreadyExists):
            await create(store, name, **changed)
        assert len(await store.futures.unfinished()) == 1

    async def test_of_many_that_come_at_once_one_is_created_and_the_bound_holds(self, store):
        tries = [create(store, "same") for _ in range(8)]
        tries += [create(store, f"n{n}", position=n, queue="other", most=4) for n in range(8)]
        found = await asyncio.gather(*tries, return_exceptions=True)
        assert len({each.name for each in found[:8]}) == 1
        assert sum(isinstance(each, Overloaded) for each in found[8:]) == 5
        assert len(await store.futures.unfinished()) == 4

    async def test_the_bound_is_of_a_project_and_of_what_is_not_done(self, store):
        await create(store, "a", most=1)
        await create(store, "a", project="other", most=1)
        with pytest.raises(Overloaded):
            await create(store, "b", position=1, most=1)
        await finish(store, "a")
        await create(store, "b", position=1, most=1)

    async def test_what_others_wait_for_is_taken_beyond_the_bound_and_nothing_else(self, store):
        await create(store, "b", position=1)
        await create(store, "c", position=2)
        for name, place in {"d": (3, "q"), "other": (0, "r"), "none": (0, "")}.items():
            with pytest.raises(Overloaded):
                await create(store, name, position=place[0], queue=place[1], most=2)
        await create(store, "a", position=0, most=2)
        assert (await store.futures.next("p", "q")).name == "projects/p/futures/a"
        with pytest.raises(Overloaded):
            await create(store, "d", position=3, most=2)


class TestOrder:
    async def test_the_next_is_the_first_that_is_not_done_without_a_gap(self, store):
        async def next_name():
            found = await store.futures.next("p", "q")
            return found and found.name.rpartition("/")[2]

        await create(store, "two", position=2)
        assert await next_name() is None
        await create(store, "zero", position=0)
        assert await next_name() == "zero"
        await finish(store, "zero")
        assert await next_name() is None
        assert await store.futures.next_position("p", "q") == 1
        await create(store, "one", position=1)
        assert await next_name() == "one"
        await finish(store, "one")
        assert await next_name() == "two"

    async def test_queues_of_other_names_and_projects_are_others(self, store):
        await create(store, "a")
        await finish(store, "a")
        await create(store, "b", queue="r")
        await create(store, "a", project="other")
        assert await store.futures.next_position("p", "q") == 1
        assert (await store.futures.next("p", "r")).name == "projects/p/futures/b"
        assert (await store.futures.next("other", "q")).project == "other"


class TestProgress:
    async def test_what_trains_is_known_until_it_is_done(self, store):
        adapter = "projects/p/adapters/a"
        await create(store, "a", queue="", adapter=adapter)
        await create(store, "b", queue="", adapter=adapter)
        assert await store.futures.training() == {}
        await store.futures.assign("projects/p/futures/a", 7)
        assert await store.futures.training() == {adapter: "projects/p/futures/a"}
        assert (await store.futures.get("projects/p/futures/a")).sequence == 7
        await finish(store, "a")
        assert await store.futures.training() == {}

    async def test_a_done_one_has_its_result_and_no_body(self, store):
        await create(store, "a")
        await finish(store, "a", now=5.0)
        await store.futures.finish("projects/p/futures/a", b"another", None, now=6.0)
        found = await store.futures.get("projects/p/futures/a")
        assert (found.done, found.result, found.done_time) == (True, b"result", 5.0)
        assert found.body is None

    async def test_what_is_not_done_is_told_in_the_order_of_its_creation(self, store):
        await create(store, "late", queue="", now=3.0)
        await create(store, "early", now=1.0)
        await create(store, "done", queue="", now=2.0)
        await finish(store, "done")
        assert await store.futures.unfinished() == [
            ("p", "q", "projects/p/futures/early"),
            ("p", "", "projects/p/futures/late"),
        ]

    async def test_blobs_are_referred_to_until_they_are_not_needed(self, store):
        body = dataclasses.replace(future("a"), body=None, body_key="futures/body")
        await store.futures.create(body, max_unfinished=9)
        assert await store.references.blob_keys() == {"futures/body"}
        await finish(store, "a", key="futures/result")
        assert await store.references.blob_keys() == {"futures/result"}
        await store.futures.expire(done_before=11.0, forget_before=0.0)
        assert await store.references.blob_keys() == set()


class TestExpiry:
    async def test_what_was_done_long_ago_goes_and_nothing_else(self, store):
        for name in ("old", "new", "undone"):
            await create(store, name, queue="")
        await finish(store, "old", now=10.0)
        await finish(store, "new", now=20.0)
        assert await until_none(store, done_before=20.0, forget_before=0.0) == [1, 0]
        assert await names(store, "old", "new", "undone") == ["new", "undone"]

    async def test_a_queue_remembers_where_it_is(self, store):
        for position, name in enumerate("abc"):
            await create(store, name, position=position)
        await finish(store, "a", "b")
        await until_none(store, done_before=11.0, forget_before=0.0)
        assert await names(store, *"abc") == ["b", "c"]
        assert (await store.futures.get("projects/p/futures/b")).result is None
        assert (await store.futures.next("p", "q")).name == "projects/p/futures/c"
        with pytest.raises(FailedPrecondition, match="position: 0"):
            await create(store, "a")

    async def test_a_queue_that_stood_still_for_very_long_is_forgotten(self, store):
        await create(store, "a", position=0)
        await create(store, "stuck", position=2)
        await finish(store, "a")
        await until_none(store, done_before=11.0, forget_before=11.0)
        assert await names(store, "a", "stuck") == []
        await create(store, "a", position=0)

    async def test_what_goes_at_once_is_bounded(self, store, monkeypatch):
        monkeypatch.setattr(rows, "_EXPIRE_AT_ONCE", 2)
        for number in range(5):
            await create(store, f"n{number}", queue="")
        await finish(store, *(f"n{number}" for number in range(5)))
        counts = await until_none(store, done_before=11.0, forget_before=0.0)
        assert max(counts) <= 4  # each kind at most 2
        assert await names(store, *(f"n{number}" for number in range(5))) == []
