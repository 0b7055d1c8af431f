"""Turns: one at a time of each project."""

from __future__ import annotations

import asyncio

import pytest

from services.coordinator.store.futures import FutureStore
from services.coordinator.store.leases import LeaseStore
from services.coordinator.store.turns import Turns
from tests.contract.test_store_futures import future


async def test_one_project_waits_for_itself_alone_and_nothing_is_left():
    turns, order = Turns(), []

    async def take(project, name):
        async with turns.of(project):
            order.append(name)

    async with asyncio.TaskGroup() as tasks, turns.of("a"):
        tasks.create_task(take("a", "second"))
        given_up = tasks.create_task(take("a", "given up"))
        await asyncio.wait_for(take("b", "other"), 20)
        given_up.cancel()
        await asyncio.sleep(0)
        order.append("first")
        assert len(turns) == 1
    assert order == ["other", "first", "second"]
    assert len(turns) == 0


class Slow:
    """A database whose transactions of some callers do not end."""

    def __init__(self):
        self.begun = []

    async def transact(self, work):
        self.begun.append(work)
        if len(self.begun) == 1:
            await asyncio.Event().wait()


def create(store, project):
    if isinstance(store, FutureStore):
        return store.create(future("f", project=project), max_unfinished=9)
    return store.create(
        f"projects/{project}/leases/a", f"projects/{project}/adapters/a", None,
        expire_time=1.0, max_leases=9, request=None, now=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("store", [FutureStore, lambda database: LeaseStore(database, 1.0)])
async def test_a_project_does_not_wait_for_the_transactions_of_others(store):
    database = Slow()
    store = store(database)
    stuck = asyncio.ensure_future(create(store, "a"))
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await create(store, "b")
    assert len(database.begun) == 2
    behind = asyncio.ensure_future(create(store, "a"))
    await asyncio.sleep(0)
    assert len(database.begun) == 2
    stuck.cancel()
    await behind
    assert len(database.begun) == 3
