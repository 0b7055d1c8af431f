"""The sampling core over a fleet whose samplers die and come back, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from rollmesh.errors import (
    DigestMismatch,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    SourceUnavailable,
    Unavailable,
)
from rollmesh.types import AdapterSource, SamplingParams
from services.coordinator.fleet.static import StaticFleet
from services.coordinator.retry import RETRY_FOR_S
from services.coordinator.sampling import ATTEMPTS, FleetSampling
from services.coordinator.scheduler import Scheduler
from tests.fakes.fleet import until
from tests.fakes.samplers import FakeSampler
from tests.fakes.virtual_time import simulate

SOURCE = AdapterSource("projects/p/adapters/a", 3, "d", "trainer")
PARAMS = SamplingParams(seed=7)


class World:
    def __init__(self, *samplers, bound=8, queue=100):
        self.samplers = samplers
        self.fleet = StaticFleet(
            trainers={},
            samplers={f"s{n}": sampler for n, sampler in enumerate(samplers)},
            rewards={},
        )
        self.scheduler = Scheduler(max_running_completions=bound, max_queued_requests=queue)
        self.sampling = FleetSampling(self.fleet, self.scheduler, locate=lambda source: source)
        self.losses: list[str] = []

    @contextlib.asynccontextmanager
    async def running(self):
        async with asyncio.TaskGroup() as tasks:
            polling = tasks.create_task(self.fleet.run())
            alive = sum(sampler.alive for sampler in self.samplers)
            await until(self.fleet, lambda: len(self.fleet.samplers("tiny")) == alive)
            yield tasks
            polling.cancel()
        assert self.scheduler.num_queued == 0
        assert [self.scheduler.outstanding(f"s{n}") for n, _ in enumerate(self.samplers)] == [
            0 for _ in self.samplers
        ]
        assert [sampler.running for sampler in self.samplers] == [0 for _ in self.samplers]

    async def sample(self, count=2, params=PARAMS, project="p"):
        return await self.sampling.sample(
            project, "tiny", SOURCE, [1, 2], count, params, lost=self._lost
        )

    async def _lost(self, problem):
        self.losses.append(problem)

    def stream(self, count=2, project="p"):
        return self.sampling.stream(project, "tiny", SOURCE, [1, 2], count, PARAMS)


def test_completions_are_whole_and_in_order_of_their_index():
    async def scenario():
        world = World(FakeSampler(tag=4))
        async with world.running():
            completions = await world.sample(3)
        assert [completion.token_ids for completion in completions] == [(4,) * 5] * 3
        assert [completion.spans[0].num_tokens for completion in completions] == [5, 5, 5]

    simulate(scenario())


@pytest.mark.parametrize("seed", range(20))
def test_no_request_of_a_job_fails_however_often_samplers_die(seed):
    async def scenario():
        rng = random.Random(seed)
        world = World(*(FakeSampler(tag=n) for n in range(3)), bound=4)

        async def havoc():
            while True:
                await asyncio.sleep(rng.expovariate(1 / 3))
                sampler = rng.choice(world.samplers)
                sampler.die() if sampler.alive else sampler.revive()

        async with world.running() as tasks:
            havoc_task = tasks.create_task(havoc())
            async with asyncio.TaskGroup() as requests:
                drawn = [requests.create_task(world.sample(rng.randint(1, 6))) for _ in range(20)]
            havoc_task.cancel()
        for completions in (task.result() for task in drawn):
            for completion in completions:
                assert len(completion.token_ids) == 5
                assert len(set(completion.token_ids)) == 1, "pieces of two samplers in one"

    simulate(scenario())


def test_a_job_waits_until_its_only_sampler_is_back():
    async def scenario():
        sampler = FakeSampler()
        world = World(sampler)
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


def test_a_stream_that_has_begun_fails_where_its_sampler_is_lost():
    async def scenario():
        sampler = FakeSampler()
        world = World(sampler, FakeSampler())
        async with world.running() as tasks:
            chunks = []

            async def consume():
                async for chunk in world.stream():
                    chunks.append(chunk)  # noqa: PERF401 - it is looked at when the stream broke

            async def die():
                await asyncio.sleep(2.5)
                sampler.die()

            tasks.create_task(die())
            with pytest.raises(Unavailable, match="lost in the middle"):
                await consume()
            assert len(chunks) == 4

    simulate(scenario())


def test_a_stream_that_has_not_begun_goes_to_another_sampler():
    async def scenario():
        first, second = FakeSampler(tag=1), FakeSampler(tag=2)
        world = World(first, second)
        async with world.running() as tasks:

            async def consume():
                return [chunk async for chunk in world.stream(1)]

            consumer = tasks.create_task(consume())
            await asyncio.sleep(0.5)
            first.die()
            assert {chunk.token_ids for chunk in await consumer} == {(2,)}

    simulate(scenario())


def test_a_stream_for_a_model_that_nobody_serves_is_unavailable_at_once():
    async def scenario():
        world = World(FakeSampler("another"))
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
        world = World(sampler)
        async with world.running():
            call = world.sample() if through == "sample" else anext(world.stream())
            with pytest.raises(InternalError, match="engine died"):
                await call
        assert sampler.begun == ATTEMPTS

    simulate(scenario())


@pytest.mark.parametrize("error", [InvalidRequest("token 101"), NotFound("no longer kept")])
def test_what_another_sampler_would_refuse_too_is_raised_at_once(error):
    async def scenario():
        sampler = FakeSampler()
        sampler.faults = [error]
        world = World(sampler)
        async with world.running():
            with pytest.raises(type(error), match=str(error)):
                await world.sample()
            assert len(world.fleet.samplers("tiny")) == 1

    simulate(scenario())


def test_a_job_without_a_sampler_is_told_before_it_waits():
    async def scenario():
        sampler = FakeSampler()
        world = World(sampler)
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
        world = World(sampler)
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


def test_a_stream_that_ends_without_all_completions_is_drawn_again():
    async def scenario():
        sampler = FakeSampler()
        sampler.torn_streams = 1
        world = World(sampler)
        async with world.running():
            assert [len(drawn.token_ids) for drawn in await world.sample()] == [5, 5]
        assert sampler.begun == 2

    simulate(scenario())


@pytest.mark.parametrize("through", ["sample", "stream", "waiting"])
def test_cancelling_the_caller_stops_the_sampler_and_frees_its_place(through):
    async def scenario():
        sampler = FakeSampler(num_tokens=1000)
        world = World(sampler, bound=1)
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
        world = World(sampler)
        async with world.running():
            async with contextlib.aclosing(world.stream()) as chunks:
                await anext(chunks)
            assert (sampler.aborted, sampler.running) == (1, 0)

    simulate(scenario())


def test_more_completions_than_a_sampler_may_run_come_in_parts_with_seeds_of_their_own():
    async def scenario():
        sampler = FakeSampler(num_tokens=1)
        world = World(sampler, bound=4)
        async with world.running():
            assert len(await world.sample(10)) == 10
            assert sampler.most_running == 4
            assert sampler.seeds[0] == 7
            assert len(set(sampler.seeds)) == 3
            streamed = [chunk.index async for chunk in world.stream(10)]
            assert streamed == list(range(10))
            assert sampler.seeds[3:] == sampler.seeds[:3]
            await world.sample(10, SamplingParams())
            assert sampler.seeds[6:] == [None, None, None]

    simulate(scenario())


def test_a_full_queue_refuses_an_interactive_caller_and_makes_a_job_wait():
    async def scenario():
        world = World(FakeSampler(), bound=1, queue=1)
        async with world.running() as tasks:
            jobs = [tasks.create_task(world.sample(1)) for _ in range(2)]
            await asyncio.sleep(0.5)
            with pytest.raises(Overloaded):
                await anext(world.stream())
            jobs.append(tasks.create_task(world.sample(1)))
            assert [len(await job) for job in jobs] == [1, 1, 1]

    simulate(scenario())


def test_load_makes_a_version_live_on_every_sampler_that_serves_and_waits_for_no_other():
    async def scenario():
        here, away, dies, other = (FakeSampler() for _ in range(4))
        away.alive = False
        other.base_model = "other"
        world = World(here, away, dies)
        async with world.running() as tasks:
            loading = tasks.create_task(world.sampling.load("tiny", SOURCE))
            await asyncio.sleep(0.5)
            dies.die()
            await loading
            assert here.loaded == {(SOURCE.adapter, SOURCE.policy_version)}
            assert [member.address for member in world.fleet.samplers("tiny")] == ["s0"]

    simulate(scenario())


def test_a_load_that_can_never_work_is_the_callers_error():
    async def scenario():
        sampler = FakeSampler()
        sampler.load_fault = DigestMismatch("not what was asked for")
        world = World(sampler, FakeSampler())
        async with world.running():
            with pytest.raises(DigestMismatch):
                await world.sampling.load("tiny", SOURCE)

    simulate(scenario())


def test_requests_go_where_their_version_is_loaded():
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        second.loaded.add((SOURCE.adapter, SOURCE.policy_version))
        world = World(first, second)
        async with world.running():
            await world.sample()
            assert (first.begun, second.begun) == (0, 1)
            await world.sampling.unload("tiny", SOURCE.adapter, 2)
            assert second.loaded
            await world.sampling.unload("tiny", SOURCE.adapter, None)
            assert not second.loaded

    simulate(scenario())


def test_logprobs_wait_their_turn_and_survive_a_lost_sampler():
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        first.faults = [Unavailable("gone")]
        world = World(first, second)
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
        world = World(FakeSampler(), bound=2)
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
