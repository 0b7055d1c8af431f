"""Samplers that are told to end finish what they have, and get nothing more; in virtual time."""

from __future__ import annotations

import asyncio

from tests.fakes.fleet import SamplingWorld
from tests.fakes.samplers import FakeSampler, drawn
from tests.fakes.virtual_time import simulate


def test_a_request_in_flight_finishes_where_it_is_and_new_ones_go_elsewhere():
    first, second = FakeSampler(num_tokens=20), FakeSampler(num_tokens=20)
    world = SamplingWorld(first, second)

    async def scenario():
        async with world.running() as tasks:
            running = tasks.create_task(world.sample())
            await asyncio.sleep(3)
            (busy,) = [sampler for sampler in (first, second) if sampler.running]
            (other,) = {first, second} - {busy}
            busy.draining = True
            await asyncio.sleep(1)
            assert world.problem(busy.name) == "draining"
            later = [tasks.create_task(world.sample()) for _ in range(3)]
            completions = await running
            assert [each.token_ids for each in completions] == [drawn(7, n, 20) for n in range(2)]
            for task in later:
                await task
            assert (busy.begun, busy.aborted, other.begun) == (1, 0, 3)
            assert world.losses == []

    simulate(scenario())


def test_what_waits_while_the_only_sampler_drains_goes_to_the_one_that_takes_its_place():
    sampler = FakeSampler()
    world = SamplingWorld(sampler)

    async def scenario():
        async with world.running() as tasks:
            sampler.draining = True
            await asyncio.sleep(1)
            waiting = tasks.create_task(world.sample())
            await asyncio.sleep(2)
            assert sampler.begun == 0
            sampler.die()
            await asyncio.sleep(1)
            sampler.draining = False
            sampler.revive()
            assert len(await waiting) == 2

    simulate(scenario())
