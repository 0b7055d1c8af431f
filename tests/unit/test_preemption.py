"""Places that are given up to requests of a higher class, in virtual time.

Tokens of the fakes are a function of seed, index and place, so what was drawn in several places has
to equal what one would have drawn.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

from rollmesh.types import Continuation, SamplingParams, join_chunks
from services.coordinator.attempts import BORDER_S
from services.coordinator.newest import Newest
from tests.fakes.fleet import PARAMS, SOURCE, SamplingWorld, at
from tests.fakes.samplers import FakeSampler, drawn
from tests.fakes.virtual_time import simulate

WHOLE = [drawn(7, 0), drawn(7, 1)]


def tokens_of(completions):
    return [completion.token_ids for completion in completions]


def actions(world, project="p"):
    schedule = world.scheduler.explain(project, "", 0.0)
    return [decision.action for decision in reversed(schedule.decisions)]


async def urgent(world, count=1, **options):
    """A request of the highest class, of another seed; when it had all."""
    await world.sample(count, replace(PARAMS, seed=8), priority="high", **options)
    return asyncio.get_running_loop().time()


def test_the_likeliest_tokens_of_what_had_come_are_kept():
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler, bound=2)
        async with world.running() as tasks:
            low = tasks.create_task(world.sample(2, replace(PARAMS, top_logprobs=1)))
            await asyncio.sleep(2.5)
            await tasks.create_task(urgent(world, 2))
            completions = await low
        assert "PREEMPTED" in actions(world)
        for completion in completions:
            assert completion.top_token_ids == tuple((token,) for token in completion.token_ids)

    simulate(scenario())


@pytest.mark.parametrize("through", ["sample", "stream"])
@pytest.mark.parametrize("after_s", [0.5, 1.5, 2.5, 3.5])
def test_what_had_come_is_kept_and_goes_on_as_if_nothing_had_happened(through, after_s):
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler, bound=2)
        async with world.running() as tasks:
            if through == "sample":
                low = tasks.create_task(world.sample(2))
            else:
                low = tasks.create_task(world.collected(2))
            await asyncio.sleep(after_s)
            high = tasks.create_task(urgent(world, 2))
            ended = await high
            completions = await low
            if through == "stream":
                completions = [
                    join_chunks([chunk for chunk in completions if chunk.index == index])
                    for index in range(2)
                ]
            assert tokens_of(completions) == WHOLE
            had = int(after_s)
            border = had + 1 if had else after_s
            assert ended == pytest.approx(border + 5, abs=0.2)
            # Of the chunk at whose border it stopped the first completion's token had come.
            begun = Continuation(0, WHOLE[0][: had + 1]), Continuation(1, WHOLE[1][:had])
            assert sampler.asked[2][3] == (begun if had else ())
            assert sampler.asked[2][2] == PARAMS
            assert actions(world) == ["ASSIGNED", "PREEMPTED", "ASSIGNED", "ASSIGNED"]

    simulate(scenario())


def test_nobody_gives_its_place_up_to_its_own_class_or_while_there_is_another():
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        world = SamplingWorld(first, second, bound=1)
        async with world.running() as tasks:
            one = tasks.create_task(world.sample(1))
            await asyncio.sleep(1.5)
            other = tasks.create_task(urgent(world))
            await asyncio.sleep(0.5)
            third = tasks.create_task(world.sample(1, priority="normal"))
            await asyncio.gather(one, other, third)
            assert first.aborted == second.aborted == 0

    simulate(scenario())


def test_a_resumed_request_keeps_its_class_and_goes_before_what_its_project_has_waiting():
    async def scenario():
        world = SamplingWorld(FakeSampler(), bound=1)
        ended = []

        async def run(name, **options):
            await world.sample(1, **options)
            ended.append(name)

        async with world.running() as tasks:
            tasks.create_task(run("normal"))
            await asyncio.sleep(0.1)
            tasks.create_task(run("waiting"))
            await asyncio.sleep(0.1)
            tasks.create_task(run("low", priority="low", project="q"))
            await asyncio.sleep(1.0)
            tasks.create_task(run("high", priority="high"))
        assert ended == ["high", "normal", "waiting", "low"]

    simulate(scenario())


def test_a_request_is_preempted_again_and_again_and_loses_nothing():
    async def scenario():
        sampler = FakeSampler(num_tokens=12)
        world = SamplingWorld(sampler, bound=2)
        whole = [drawn(7, index, 12) for index in range(2)]
        async with world.running() as tasks:
            low = tasks.create_task(world.sample(2, priority="low"))
            for _ in range(3):
                await asyncio.sleep(1.7)
                await urgent(world, 2)
            assert tokens_of(await low) == whole
            assert actions(world).count("PREEMPTED") == 3

    simulate(scenario())


@pytest.mark.parametrize("constraint", [{"regex": "a"}, {"json_schema": "{}"}])
def test_what_an_engine_would_begin_anew_is_left_alone(constraint):
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler, bound=1)
        async with world.running() as tasks:
            low = tasks.create_task(
                world.sample(1, SamplingParams(seed=7, **constraint), priority="low")
            )
            await asyncio.sleep(1.5)
            ended = await tasks.create_task(urgent(world))
            assert tokens_of(await low) == WHOLE[:1]
            assert sampler.aborted == 0
            assert ended == pytest.approx(10, abs=0.2)

    simulate(scenario())


def test_log_probabilities_are_left_alone_and_a_completion_stops_instead():
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler, bound=2)
        async with world.running() as tasks:
            low = tasks.create_task(world.sample(1, priority="low"))
            await asyncio.sleep(1.5)
            judged = tasks.create_task(
                world.sampling.compute_logprobs("p", "tiny", SOURCE, [1, 2], priority="low")
            )
            await asyncio.sleep(0.2)
            high = tasks.create_task(urgent(world))
            assert (await judged).logprobs == (1.0, 2.0)
            assert tokens_of(await low) == WHOLE[:1]
            assert await high == pytest.approx(2 + 5, abs=0.2)

    simulate(scenario())


def test_a_sampler_that_draws_nothing_gives_its_place_up_soon():
    async def scenario():
        sampler = FakeSampler(token_s=1.0)
        world = SamplingWorld(sampler, bound=1)
        async with world.running() as tasks:
            low = tasks.create_task(world.sample(1, priority="low"))
            await asyncio.sleep(1.5)
            sampler.token_s = 100.0
            await asyncio.sleep(0.6)
            sampler.token_s = 1.0
            high = tasks.create_task(urgent(world))
            assert await high == pytest.approx(2.1 + BORDER_S + 5, abs=0.2)
            assert tokens_of(await low) == WHOLE[:1]

    simulate(scenario())


def test_a_place_is_given_up_also_where_newer_versions_are_followed():
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler, bound=2)
        newest = Newest(SOURCE)
        newer = replace(SOURCE, policy_version=4, digest="d4")
        async with world.running() as tasks:
            low = tasks.create_task(world.sample(2, newest=newest))
            tasks.create_task(at(3.0, lambda: newest.announce(newer)))
            await asyncio.sleep(1.5)
            await urgent(world)
            first, second = await low
            assert tokens_of([first, second]) == WHOLE
            assert [span.policy_version for span in first.spans] == [3, 4]

    simulate(scenario())


@pytest.mark.parametrize("leaves", ["low", "high"])
def test_whoever_leaves_in_the_middle_leaves_nothing_behind(leaves):
    async def scenario():
        world = SamplingWorld(FakeSampler(), bound=1)
        async with world.running() as tasks:
            low = tasks.create_task(world.sample(1, priority="low"))
            await asyncio.sleep(1.5)
            high = tasks.create_task(urgent(world))
            await asyncio.sleep(0.1)
            (low if leaves == "low" else high).cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await (high if leaves == "low" else low)

    simulate(scenario())
