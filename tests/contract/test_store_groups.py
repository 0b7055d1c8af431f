"""Finished groups in the store, over every database that it promises to work on."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select

from rollmesh.errors import FailedPrecondition, NotFound
from rollmesh.job import Warned
from services.coordinator.store import open_store
from services.coordinator.store.tables import job_groups
from tests.contract.test_store import RETENTION_S, J, create, postgresql, spec_of, step, store, url

__all__ = ["postgresql", "store", "url"]

TWO_A_STEP = {"algorithm": {"groups_per_step": 2, "group_size": 2, "max_staleness": 1}}
OTHER = "projects/p/jobs/k"


async def running(store, job="j"):
    await create(store, job, spec=spec_of(**TWO_A_STEP))
    await store.jobs.command(f"projects/p/jobs/{job}", "start", now=1.0)


async def num_rows(store):
    async with store.groups._database.read() as connection:
        return (await connection.execute(select(func.count()).select_from(job_groups))).scalar_one()


async def test_what_is_kept_is_found_by_number_until_its_step_is_recorded(store):
    await running(store)
    await running(store, "k")
    bodies = {number: bytes([number, 0, 255]) * 1000 for number in (3, 0, 2, 1)}
    for number, body in bodies.items():
        await store.groups.keep(J, number, body, now=2.0)
    await store.groups.keep(OTHER, 0, b"another job's", now=2.0)
    assert await store.groups.waiting(J) == bodies
    await store.jobs.record(J, Warned(reason="REWARD_UNAVAILABLE", message="gone"), now=3.0)
    assert await store.groups.waiting(J) == bodies
    await store.jobs.record(J, step(1), now=3.0)
    assert sorted(await store.groups.waiting(J)) == [2, 3]
    assert await store.groups.waiting(OTHER) == {0: b"another job's"}
    assert await num_rows(store) == 3


async def test_a_group_that_was_drawn_again_takes_the_place_of_the_first(store):
    await running(store)
    await store.groups.keep(J, 0, b"first", now=2.0)
    await store.groups.keep(J, 0, b"again", now=3.0)
    assert await store.groups.waiting(J) == {0: b"again"}


@pytest.mark.parametrize("command", ["finish", "fail", "cancel"])
async def test_nothing_is_kept_for_a_job_that_has_ended_and_for_one_that_pauses_all_is(
    store, command
):
    await running(store)
    await store.groups.keep(J, 0, b"group", now=2.0)
    await store.jobs.command(J, "pause", now=2.0)
    await store.groups.keep(J, 1, b"group", now=2.0)
    if command == "cancel":
        await store.jobs.command(J, "settle", now=2.0)
        with pytest.raises(FailedPrecondition, match="PAUSED"):
            await store.groups.keep(J, 2, b"late", now=2.0)
    assert sorted(await store.groups.waiting(J)) == [0, 1]
    await store.jobs.command(J, command, now=3.0)
    assert await num_rows(store) == 0
    with pytest.raises(FailedPrecondition, match="does not run"):
        await store.groups.keep(J, 2, b"late", now=3.0)
    assert await num_rows(store) == 0


async def test_nothing_is_kept_for_a_job_that_does_not_exist(store):
    with pytest.raises(NotFound):
        await store.groups.keep(J, 0, b"group", now=2.0)


async def test_trained_groups_are_retained_for_as_long_as_is_asked_and_wait_for_nobody(url):
    async with open_store(url, request_retention_s=RETENTION_S, rollout_retention_s=10) as store:
        await running(store)
        for number in range(6):
            await store.groups.keep(J, number, b"group", now=2.0)
        await store.jobs.record(J, step(1), now=10.0)
        await store.jobs.record(J, step(2), now=20.0)
        assert sorted(await store.groups.waiting(J)) == [4, 5]
        assert await num_rows(store) == 6
        assert await store.groups.drop_trained(20.0) == 2
        assert await store.groups.drop_trained(21.0) == 2
        assert await store.groups.drop_trained(1e9) == 0
        await store.jobs.command(J, "finish", now=30.0)
        assert await num_rows(store) == 0


async def test_what_a_loop_knows_is_stored_with_its_events_and_only_with_them(store):
    await running(store)
    assert (await store.jobs.load(J)).memory == {}
    known = {"tasks": {"last": [1, 2.5]}, "border": {"checkpoint": "projects/p/adapters/j/x"}}
    await store.jobs.record(J, step(1), memory=known, now=2.0)
    await store.jobs.record(J, step(2), now=3.0)
    assert (await store.jobs.load(J)).memory == known
    assert (await store.jobs.get(J)).best_checkpoint == "projects/p/adapters/j/x"
    await store.jobs.command(J, "finish", now=4.0)
    with pytest.raises(FailedPrecondition):
        await store.jobs.record(J, step(3), memory={}, now=5.0)
    assert (await store.jobs.load(J)).memory == known
