"""What jobs leave behind is let go of in time, over every database that the store promises."""

from __future__ import annotations

import pytest

from rollmesh.errors import FailedPrecondition
from rollmesh.job import StateChanged, Warned
from services.coordinator.jobs import Jobs
from services.coordinator.pruning import Pruning
from services.coordinator.store import StoredFuture
from services.coordinator.store import events as event_rows
from services.coordinator.store import groups as group_rows
from services.coordinator.store import ops as op_rows
from services.coordinator.store import records as record_rows
from tests.contract.test_record_store import num_records, put
from tests.contract.test_store import J, postgresql, step, store, url
from tests.contract.test_store_groups import num_rows, running

__all__ = ["postgresql", "store", "url"]

NUM_WARNINGS = 23
LIVE = "projects/p/jobs/live"


@pytest.fixture(autouse=True)
def small_transactions(monkeypatch):
    for module, name in (
        (event_rows, "_AT_ONCE"),
        (group_rows, "_AT_ONCE"),
        (op_rows, "_EXPIRE_AT_ONCE"),
        (record_rows, "MAX_EXPIRED"),
    ):
        monkeypatch.setattr(module, name, 5)


def pruning(store, now):
    return Pruning(
        store.events,
        store.groups,
        store.records,
        store.futures,
        event_retention_s=100.0,
        rollout_retention_s=10.0,
        result_retention_s=20.0,
        request_retention_s=1000.0,
        clock=lambda: now,
    )


async def numbers(store, job):
    return [event.number for event in (await store.jobs.events(job, after=0)).events]


@pytest.fixture
async def ended(store):
    """A job that ended at 50.0 beside one that runs; the number of its last event."""
    await running(store)
    await running(store, "live")
    for job in (J, LIVE):
        for _ in range(NUM_WARNINGS):
            await store.jobs.record(job, Warned(reason="R", message="m"), now=2.0)
    await store.jobs.command(J, "finish", now=50.0)
    last = NUM_WARNINGS + 3
    assert await numbers(store, J) == list(range(1, last + 1))
    return last


async def test_of_a_job_that_ended_long_ago_the_last_event_is_kept_and_of_others_all(store, ended):
    of_live = await numbers(store, LIVE)
    await pruning(store, 150.0).look()
    assert await numbers(store, J) == list(range(1, ended + 1))
    await pruning(store, 150.1).look()
    page = await store.jobs.events(J, after=0)
    assert [event.number for event in page.events] == [ended]
    assert isinstance(page.events[0].event, StateChanged)
    assert (page.last_event, page.ended) == (ended, True)
    assert (await store.jobs.get(J)).state == "SUCCEEDED"
    assert await numbers(store, LIVE) == of_live


async def test_futures_are_let_go_of_when_their_results_were_kept_for_long_enough(store):
    for name, done in (("a", 50.0), ("b", 80.0)):
        new = StoredFuture(f"projects/p/futures/{name}", "p", "", 0, "d", "", 1.0, b"work")
        await store.futures.create(new, max_unfinished=9)
        await store.futures.finish(new.name, b"result", None, now=done)
    await pruning(store, 70.0).look()
    assert await store.futures.get("projects/p/futures/a") is not None
    await pruning(store, 71.0).look()
    assert await store.futures.get("projects/p/futures/a") is None
    assert await store.futures.get("projects/p/futures/b") is not None


async def test_what_is_let_go_of_at_once_is_bounded_and_leaves_no_gaps(store, ended):
    assert await store.events.drop_of_ended(1e9) == 5
    assert await numbers(store, J) == list(range(6, ended + 1))


async def test_a_watch_says_what_is_kept_no_longer_and_from_0_on_shows_what_is(store, ended):
    jobs = Jobs(
        store.jobs,
        None,
        None,
        base_models=None,
        checks=None,
        projects=None,
        queue=lambda _name: None,
        problems=lambda _name: (),
        max_pending=1,
        clock=lambda: 0.0,
        new_id=str,
    )
    await store.events.drop_of_ended(1e9)
    with pytest.raises(FailedPrecondition, match="before 6 are kept no longer") as refused:
        await anext(jobs.watch(J, 4))
    assert refused.value.context["first_event"] == "6"
    for after in (5, 0):
        seen = [event.number async for event in jobs.watch(J, after)]
        assert seen == list(range(6, ended + 1))


async def test_trained_groups_go_after_their_time_and_those_that_wait_stay(store):
    store.jobs._rollout_retention_s = 10.0
    await running(store)
    for number in range(6):
        await store.groups.keep(J, number, b"group", now=2.0)
    for number in range(1, 3):
        await store.jobs.record(J, step(number), now=10.0 * number)
    await pruning(store, 20.5).look()
    assert await num_rows(store) == 4
    await pruning(store, 1e9).look()
    assert await num_rows(store) == 2
    assert sorted(await store.groups.waiting(J)) == [4, 5]


async def test_records_go_when_they_have_expired_and_the_others_stay(store):
    for number in range(12):
        await put(store, f"k{number}", expire_time=None if number < 3 else 10.0 + number)
    await pruning(store, 20.0).look()
    assert await num_records(store) == 3 + 1
    await pruning(store, 1e9).look()
    assert await num_records(store) == 3
