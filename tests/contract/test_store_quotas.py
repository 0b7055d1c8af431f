"""What the store counts for quotas of projects, over every database that it works on."""

from __future__ import annotations

import asyncio

import pytest

from rollmesh import types
from rollmesh.errors import QuotaExceeded
from services.coordinator.store import Request
from tests.contract.test_store import LORA, create, postgresql, store, url

__all__ = ["postgresql", "store", "url"]

J, A = "projects/p/jobs/j", "projects/p/adapters/a"


async def reserve(store, name, *, job="", max_adapters=2, project="p"):
    return await store.adapters.reserve(
        f"projects/{project}/adapters/{name}",
        "arith",
        LORA,
        job=job,
        request=None if job else Request.of(project, f"r-{name}", "CreateAdapter", name),
        now=1.0,
        max_adapters=max_adapters,
    )


async def make(store, name, *, job=""):
    await store.adapters.give(await store.adapters.get(name), "trainer:1", now=1.0)
    made = types.TrainerAdapter(name, LORA, 0, 1, has_pending_gradients=False)
    await store.adapters.confirm(name, job=job, made=made)


class TestAdaptersOfAProject:
    async def test_one_more_than_it_may_have_is_refused_and_reserves_nothing(self, store):
        await reserve(store, "a")
        await reserve(store, "b")
        with pytest.raises(QuotaExceeded, match="has 2 adapters, and its quota is 2") as caught:
            await reserve(store, "c")
        assert caught.value.context == {
            "project": "p",
            "quota": "adapters",
            "value": "2",
            "allowed": "2",
        }
        assert caught.value.retry_after_s > 0
        assert await store.adapters.counts() == {"p": 2}
        assert {stored.adapter.name[-1] for stored in await store.adapters.all()} == {"a", "b"}

    async def test_a_repeated_request_is_no_further_adapter(self, store):
        first = await reserve(store, "a", max_adapters=1)
        assert await reserve(store, "a", max_adapters=1) == first

    async def test_those_of_another_project_do_not_count(self, store):
        await reserve(store, "a", max_adapters=1)
        await reserve(store, "a", max_adapters=1, project="q")

    async def test_many_at_once_get_as_many_as_there_is_room_for(self, store):
        outcomes = await asyncio.gather(
            *(reserve(store, f"a{number}", max_adapters=3) for number in range(12)),
            return_exceptions=True,
        )
        refused = [error for error in outcomes if isinstance(error, QuotaExceeded)]
        assert len(refused) == 9, outcomes
        assert await store.adapters.count("p") == 3

    async def test_a_deleted_one_makes_room_and_so_does_one_that_no_trainer_took(self, store):
        await reserve(store, "a", max_adapters=1)
        await make(store, A)
        await store.adapters.delete(A, None, now=1.0)
        await reserve(store, "b", max_adapters=1)
        await store.adapters.release("projects/p/adapters/b")
        await reserve(store, "c", max_adapters=1)

    async def test_a_jobs_counts_once_it_is_made_and_not_while_the_job_waits(self, store):
        await create(store, adapter="a")
        assert await store.adapters.count("p") == 0
        await reserve(store, "b", max_adapters=1)
        with pytest.raises(QuotaExceeded):
            await reserve(store, "a", job=J, max_adapters=1)
        await store.adapters.delete("projects/p/adapters/b", None, now=1.0)
        await reserve(store, "a", job=J, max_adapters=1)
        with pytest.raises(QuotaExceeded):
            await reserve(store, "c", max_adapters=1)
        await store.adapters.release(A)  # no trainer took it, and it is tried again
        assert await store.adapters.count("p") == 0
        await reserve(store, "a", job=J, max_adapters=1)
        await make(store, A, job=J)
        await reserve(store, "a", job=J, max_adapters=1)  # it goes on after a pause
        assert await store.adapters.count("p") == 1

    async def test_a_job_has_its_adapter_once_it_counts(self, store):
        await create(store, adapter="a")

        async def has_adapter():
            (job,) = await store.jobs.queue()
            return job.has_adapter

        assert not await has_adapter()
        await reserve(store, "a", job=J)
        assert await has_adapter()
        await store.adapters.not_being_made(A)
        assert not await has_adapter()
        await reserve(store, "a", job=J)
        await make(store, A, job=J)
        await store.adapters.not_being_made(A)  # it is there
        assert await has_adapter()

    async def test_what_a_coordinator_left_half_made_counts_no_more_once_another_has_begun(
        self, store
    ):
        await reserve(store, "a", max_adapters=1)
        await store.adapters.none_is_being_made()
        await reserve(store, "b", max_adapters=1)
        await make(store, "projects/p/adapters/b")
        await store.adapters.none_is_being_made()
        with pytest.raises(QuotaExceeded):
            await reserve(store, "a", max_adapters=1)


class TestUsage:
    async def test_tokens_add_up_by_project_and_day(self, store):
        await store.usage.add({("p", 7): (10, 1), ("q", 7): (20, 2), ("p", 8): (5, 5)})
        await store.usage.add({("p", 7): (100, 10)})
        assert await store.usage.of(7) == {"p": (110, 11), "q": (20, 2)}
        assert await store.usage.of(8) == {"p": (5, 5)}
        assert await store.usage.of(9) == {}

    async def test_past_days_can_be_forgotten(self, store):
        await store.usage.add({("p", 7): (1, 1), ("p", 8): (2, 2)})
        await store.usage.forget(before=8)
        assert (await store.usage.of(7), await store.usage.of(8)) == ({}, {"p": (2, 2)})
