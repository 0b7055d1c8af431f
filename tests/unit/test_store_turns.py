"""A project's creations in the store do not wait for the transactions of others."""

from __future__ import annotations

import asyncio

import pytest

from services.coordinator.store.futures import FutureStore
from services.coordinator.store.leases import LeaseStore
from tests.contract.test_store_futures import future


class Slow:
    """A database whose first transaction does not end."""

    def __init__(self):
        self.begun = 0

    async def transact(self, work):
        self.begun += 1
        if self.begun == 1:
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
    assert database.begun == 2
    stuck.cancel()
