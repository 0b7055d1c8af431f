"""The sampling core over a fleet: order, patience, places and errors, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

from rollmesh.errors import (
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    SourceUnavailable,
    Unavailable,
)
from rollmesh.types import SamplingParams
from services.coordinator.endurance import ATTEMPTS
from services.coordinator.placement import LEAVES_WITHIN_S
from services.coordinator.retry import RETRY_FOR_S
from services.coordinator.scheduler import ProjectPolicy
from tests.fakes.fleet import PARAMS, SOURCE, SamplingWorld, until
from tests.fakes.samplers import FakeSampler, drawn
from tests.fakes.virtual_time import simulate


def test_completions_are_whole_and_in_order_of_their_index():
    async def scenario():
        world = SamplingWorld(FakeSampler())
        async with world.running():
            completions = await world.sample(3)
        assert [completion.token_ids for completion in completions] == [
            drawn(7, index) for index in range(3)
        ]
        assert [completion.spans[0].num_tokens for completion in completions] == [5, 5, 5]
        (asked,) = world.samplers[0].asked
        assert asked[1:] == ("p", SamplingParams(seed=7), ())

    simulate(scenario())


def test_a_job_waits_until_its_only_sampler_is_back():
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler)
        async with world.running() as tasks:
            request = tasks.create_task(world.sample())
            await asyncio.sleep(2.5)
            sampler.die()
            await asyncio.sleep(1_000)
            assert not request.done()
            assert world.losses == ["connection reset", "no sampler of 'tiny' serves now"]
            sampler.revive()
            assert len(await request) == 2

    simulate(scenario())


def test_a_stream_for_a_model_that_nobody_serves_is_unavailable_at_once():
    async def scenario():
        world = SamplingWorld(FakeSampler("another"))
        async with asyncio.TaskGroup() as tasks:
            polling = tasks.create_task(world.fleet.run())
            await asyncio.sleep(1)
            with pytest.raises(Unavailable, match="no sampler of 'tiny'"):
                await anext(world.stream())
            polling.cancel()

    simulate(scenario())


@pytest.mark.parametrize("through", ["sample", "stream"])
def test_a_request_that_breaks_every_engine_does_not_go_round_for_ever(through):
    async def scenario():
        sampler = FakeSampler()
        sampler.faults = [InternalError("engine died")] * 100
        world = SamplingWorld(sampler)
        async with world.running():
            call = world.sample() if through == "sample" else anext(world.stream())
            with pytest.raises(InternalError, match="engine died"):
                await call
        assert sampler.begun == ATTEMPTS

    simulate(scenario())


@pytest.mark.parametrize(
    ("error", "source"), [(InvalidRequest("token 101"), SOURCE), (NotFound("no model"), None)]
)
def test_what_another_sampler_would_refuse_too_is_raised_at_once(error, source):
    async def scenario():
        sampler = FakeSampler()
        sampler.faults = [error]
        world = SamplingWorld(sampler)
        async with world.running():
            with pytest.raises(type(error), match=str(error)):
                await world.sample(source=source)
            assert len(world.fleet.samplers("tiny")) == 1

    simulate(scenario())


def test_a_job_without_a_sampler_is_told_before_it_waits():
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler)
        async with world.running() as tasks:
            sampler.die()
            await asyncio.sleep(10)
            request = tasks.create_task(world.sample())
            await asyncio.sleep(10)
            assert world.losses == ["no sampler of 'tiny' serves now"]
            sampler.revive()
            await request

    simulate(scenario())


def test_a_trainer_that_is_away_is_not_its_samplers_fault_and_is_waited_for_only_so_long():
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler)
        changes = []
        async with world.running():
            world.fleet.on_change(lambda: changes.append(world.fleet.samplers("tiny")))
            sampler.faults = [SourceUnavailable("t:1 is away")] * 3
            sampler.load_fault = SourceUnavailable("t:1 is away")
            await world.sampling.load("tiny", SOURCE)
            await world.sample()
            assert world.losses == ["t:1 is away"] * 3
            sampler.faults = [SourceUnavailable("t:1 is away")] * 1000
            start = asyncio.get_running_loop().time()
            with pytest.raises(SourceUnavailable, match=r"for 120 s no sampler .* t:1 is away"):
                await world.sample()
            assert asyncio.get_running_loop().time() - start == pytest.approx(RETRY_FOR_S, abs=5)
        assert all(changes), "the sampler was out at times"

    simulate(scenario())


@pytest.mark.parametrize("through", ["sample", "stream", "waiting"])
def test_cancelling_the_caller_stops_the_sampler_and_frees_its_place(through):
    async def scenario():
        sampler = FakeSampler(num_tokens=1000)
        world = SamplingWorld(sampler, bound=1)
        async with world.running() as tasks:

            async def consume():
                async for _ in world.stream():
                    pass

            if through == "waiting":
                first = tasks.create_task(world.sample())
                await asyncio.sleep(1)
            call = tasks.create_task(consume() if through == "stream" else world.sample())
            await asyncio.sleep(2.5)
            call.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if through == "waiting":
                assert (sampler.begun, sampler.aborted) == (1, 0)
                first.cancel()
                await asyncio.sleep(1)
            assert (sampler.begun, sampler.aborted, sampler.running) == (1, 1, 0)

    simulate(scenario())


def test_leaving_a_stream_in_the_middle_stops_the_sampler():
    async def scenario():
        sampler = FakeSampler(num_tokens=1000)
        world = SamplingWorld(sampler)
        async with world.running():
            async with contextlib.aclosing(world.stream()) as chunks:
                await anext(chunks)
            assert (sampler.aborted, sampler.running) == (1, 0)

    simulate(scenario())


@pytest.mark.parametrize("seed", [7, None])
def test_a_request_in_parts_draws_what_it_would_draw_at_once(seed):
    async def scenario():
        sampler = FakeSampler(num_tokens=2)
        world = SamplingWorld(sampler, bound=4)
        whole = [drawn(seed or 1234, index, 2) for index in range(10)]
        async with world.running():
            completions = await world.sample(10, SamplingParams(seed=seed))
            assert [completion.token_ids for completion in completions] == whole
            assert sampler.most_running == 4
            parts = [[begun.index for begun in asked[3]] for asked in sampler.asked]
            assert parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
            streamed = [chunk.index for chunk in await world.collected(10)]
            assert streamed == [0, 1, 2, 3] * 2 + [4, 5, 6, 7] * 2 + [8, 9] * 2

    simulate(scenario())


def test_a_full_queue_refuses_an_interactive_caller_and_makes_a_job_wait():
    async def scenario():
        world = SamplingWorld(FakeSampler(), bound=1, queue=1)
        async with world.running() as tasks:
            jobs = [tasks.create_task(world.sample(1)) for _ in range(2)]
            await asyncio.sleep(0.5)
            with pytest.raises(Overloaded):
                await anext(world.stream())
            jobs.append(tasks.create_task(world.sample(1)))
            assert [len(await job) for job in jobs] == [1, 1, 1]

    simulate(scenario())


def test_a_jobs_requests_wait_in_line_for_a_full_queue_and_leave_it_when_cancelled():
    async def scenario():
        world = SamplingWorld(FakeSampler(), bound=1, queue=2)
        most = 0
        ended = []

        async def draw_one(number, priority):
            await world.sample(1, job=JOB, priority=priority)
            ended.append(number)

        async with world.running() as tasks:
            drawing = []
            for number in range(10):
                priority = "normal" if number < 8 else "high"
                drawing.append(tasks.create_task(draw_one(number, priority)))
                await asyncio.sleep(0)
            drawing[5].cancel()
            # Places in the queue come free without an end too.
            drawing[1].cancel()
            while len(ended) < 8:
                most = max(most, world.scheduler.num_queued)
                await asyncio.sleep(0.05)
        assert most == 2 + 1  # the preempted one is never refused
        assert [number for number in ended if number < 8] == [0, 2, 3, 4, 6, 7]
        assert max(ended.index(8), ended.index(9)) < ended.index(4)
        assert world.losses == []

    simulate(scenario())


def test_a_caller_that_reads_no_more_loses_its_place_to_a_higher_class_and_goes_on_later():
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler, bound=1, q=ProjectPolicy(max_priority=1))
        async with world.running():
            low = world.stream(1, priority="low")
            chunks = [await anext(low)]
            async with asyncio.timeout(LEAVES_WITHIN_S + 10):
                await world.collected(1, project="q", priority="high")
            assert sampler.running == 0
            chunks += [chunk async for chunk in low]
        assert sum((chunk.token_ids for chunk in chunks), ()) == drawn(7, 0)

    simulate(scenario())


def test_a_caller_that_leaves_after_its_place_was_taken_away_leaves_nothing_behind():
    async def scenario():
        world = SamplingWorld(FakeSampler(), bound=1, q=ProjectPolicy(max_priority=1))
        async with world.running():
            low = world.stream(1, priority="low")
            await anext(low)
            async with asyncio.timeout(LEAVES_WITHIN_S + 10):
                await world.collected(1, project="q", priority="high")
            await low.aclose()

    simulate(scenario())


def test_a_request_that_leaves_the_queue_lets_those_go_that_waited_behind_it():
    async def scenario():
        tokens = ProjectPolicy(max_tokens_in_flight=100)
        world = SamplingWorld(FakeSampler(), bound=8, p=tokens)
        long, short = replace(PARAMS, max_tokens=60), replace(PARAMS, max_tokens=30)
        async with world.running():
            first = asyncio.create_task(world.sample(1, long, job=JOB))
            await asyncio.sleep(0)
            blocker = asyncio.create_task(world.sample(1, long, job=JOB))
            await asyncio.sleep(0)
            behind = asyncio.create_task(world.sample(1, short, job=JOB))
            await asyncio.sleep(0.01)
            assert world.scheduler.num_queued == 2
            blocker.cancel()
            await asyncio.sleep(0.01)
            assert world.scheduler.num_queued == 0
            assert not first.done()
            await first
            await behind

    simulate(scenario())


def test_a_jobs_requests_that_a_full_queue_refused_keep_to_its_bound_and_overtake_nobody():
    async def scenario():
        world = SamplingWorld(FakeSampler(), bound=1, queue=2)
        most = 0
        ended = []

        async def draw_one(number):
            await world.sample(1)
            ended.append(number)

        async with world.running() as tasks:
            for number in range(10):
                tasks.create_task(draw_one(number))
                await asyncio.sleep(0)
            while len(ended) < 10:
                most = max(most, world.scheduler.num_queued)
                await asyncio.sleep(0.05)
        assert most == 2
        assert ended[:3] == [0, 1, 2]

    simulate(scenario())


JOB = "projects/p/jobs/j"


def test_a_job_whose_last_sampler_is_in_quarantine_hears_of_it_while_it_waits():
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler, bound=1)
        told = "all samplers of 'tiny' that serve are in quarantine for projects/p/jobs/j"
        async with world.running() as tasks:
            running = tasks.create_task(world.sample(1))
            await asyncio.sleep(1)
            waiting = tasks.create_task(world.sample(1, job=JOB))
            other = tasks.create_task(world.sample(1, job="projects/p/jobs/k"))
            await asyncio.sleep(1)
            assert world.losses == []
            world.sampling.quarantine(JOB, sampler.instance_id, "it drifts")
            await asyncio.sleep(0.1)
            assert world.losses == [told]
            await running
            await other
            late = tasks.create_task(world.sample(1, job=JOB))
            await asyncio.sleep(1000)
            assert world.losses == [told, told]
            assert not waiting.done()
            world.sampling.end_quarantines(JOB)
            assert len(await waiting) == len(await late) == 1
            assert sampler.begun == 4

    simulate(scenario())


@pytest.mark.parametrize("lost", ["in quarantine", "dead"])
def test_a_job_that_waits_for_its_turn_hears_that_the_last_sampler_went(lost):
    async def scenario():
        first, second = FakeSampler(num_tokens=100), FakeSampler(num_tokens=100)
        world = SamplingWorld(first, second, bound=1)
        async with world.running() as tasks:
            if lost == "in quarantine":
                world.sampling.quarantine(JOB, first.instance_id, "it drifts")
            else:
                first.die()
                await asyncio.sleep(1)
            for _ in range(2):
                tasks.create_task(world.collected(1))
            await asyncio.sleep(1)
            waiting = tasks.create_task(world.sample(1, job=JOB))
            await asyncio.sleep(1)
            assert world.losses == []
            second.die()
            await asyncio.sleep(1)
            assert len(world.losses) == 1
            assert ("quarantine" in world.losses[0]) == (lost == "in quarantine")
            second.revive()
            await waiting

    simulate(scenario())


def test_a_caller_whose_report_fails_while_it_waits_leaves_nothing_behind():
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler, bound=1)

        async def lost(problem):
            raise Unavailable(f"no store for {problem}")

        async with world.running() as tasks:
            running = tasks.create_task(world.sample(1))
            await asyncio.sleep(1)
            waiting = asyncio.ensure_future(
                world.sampling.sample(
                    "p", "tiny", SOURCE, [1], 1, SamplingParams(), lost=lost, job=JOB
                )
            )
            await asyncio.sleep(1)
            world.sampling.quarantine(JOB, sampler.instance_id, "it drifts")
            with pytest.raises(Unavailable):
                await waiting
            assert world.scheduler.num_queued == 0
            await running

    simulate(scenario())


def test_requests_go_where_their_version_is_loaded():
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        second.loaded.add((SOURCE.adapter, SOURCE.policy_version))
        world = SamplingWorld(first, second)
        async with world.running():
            await world.sample()
            assert (first.begun, second.begun) == (0, 1)
            await world.sampling.unload("tiny", SOURCE.adapter, 2)
            assert second.loaded
            await world.sampling.unload("tiny", SOURCE.adapter, None)
            assert not second.loaded

    simulate(scenario())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"num_queued": 20}, {}),
        ({"max_loras": 1, "resident": {("another", 1)}}, {"max_loras": 1}),
        ({}, {"resident": {(SOURCE.adapter, SOURCE.policy_version)}}),
    ],
)
def test_requests_go_where_the_samplers_say_that_they_begin_soonest(first, second):
    async def scenario():
        world = SamplingWorld(FakeSampler(), FakeSampler())
        for sampler, told in zip(world.samplers, (first, second), strict=True):
            for name, value in told.items():
                setattr(sampler, name, value)
        async with world.running():
            await world.sample()
            assert [sampler.begun for sampler in world.samplers] == [0, 1]

    simulate(scenario())


def test_a_prompt_goes_where_it_was_seen_before():
    async def scenario():
        world = SamplingWorld(FakeSampler(), FakeSampler())
        prompt = list(range(2000))

        async def draw():
            await world.sampling.sample(
                "p", "tiny", None, prompt, 1, SamplingParams(), lost=world.losses.append
            )

        async with world.running() as tasks:
            elsewhere = tasks.create_task(world.sample())
            await asyncio.sleep(0.5)
            await draw()
            await elsewhere
            await draw()
            assert [sampler.begun for sampler in world.samplers] == [1, 2]

    simulate(scenario())


def test_logprobs_wait_their_turn_and_survive_a_lost_sampler():
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        first.faults = [Unavailable("gone")]
        world = SamplingWorld(first, second)
        async with world.running():
            found = await world.sampling.compute_logprobs("p", "tiny", SOURCE, [1, 2])
            assert found.logprobs == (1.0, 2.0)
            assert first.begun + second.begun == 2
            first.faults = [InternalError("bug")] * 9
            second.faults = [InternalError("bug")] * 9
            with pytest.raises(InternalError):
                await world.sampling.compute_logprobs("p", "tiny", SOURCE, [1, 2])

    simulate(scenario())


@pytest.mark.parametrize("leaves", ["served", "cancelled"])
def test_the_measured_queue_falls_back_when_requests_leave_it(recorded, leaves):
    def queued():
        return [point.value for point in recorded()["rollmesh.scheduler.queued"].data.data_points]

    async def scenario():
        world = SamplingWorld(FakeSampler(), bound=2)
        async with world.running() as tasks:
            first = tasks.create_task(world.sample())
            await asyncio.sleep(1)
            second = tasks.create_task(world.sample())
            await asyncio.sleep(1)
            assert queued() == [1]
            if leaves == "cancelled":
                second.cancel()
            await asyncio.wait([first, second])
            assert queued() == [0]

    simulate(scenario())


def test_a_sampler_that_drains_ends_what_it_has_and_gets_nothing_more():
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        second.alive = False
        world = SamplingWorld(first, second)
        async with world.running() as tasks:
            running = tasks.create_task(world.sample(1))
            await asyncio.sleep(1.5)
            first.draining = True
            second.revive()
            await until(world.fleet, lambda: world.serving == ["s1"])
            other = tasks.create_task(world.sample(1))
            await asyncio.sleep(0.5)
            assert (first.running, second.running) == (1, 1)
            await asyncio.gather(running, other)
            assert (first.begun, second.begun, first.aborted) == (1, 1, 0)

    simulate(scenario())


def test_a_job_waits_while_its_only_sampler_drains():
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler)
        async with world.running() as tasks:
            sampler.draining = True
            await until(world.fleet, lambda: not world.serving)
            waiting = tasks.create_task(world.sample(1))
            await asyncio.sleep(100)
            assert (sampler.begun, len(world.losses)) == (0, 1)
            sampler.draining = False
            await waiting

    simulate(scenario())
