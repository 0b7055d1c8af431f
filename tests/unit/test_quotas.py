"""Quotas of tokens through the sampling core, and what a restart keeps of them, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from rollmesh.errors import QuotaExceeded, Unavailable
from services.coordinator.scheduler import ProjectPolicy
from services.coordinator.usage import DAYS_KEPT, INTERVAL_S, UsageKeeper
from tests.fakes.fleet import SOURCE, SamplingWorld
from tests.fakes.samplers import FakeSampler
from tests.fakes.virtual_time import simulate

JOB = "projects/p/jobs/j"
DAY_S = 86400
EVENING = DAY_S - 100.0
# A request of one completion has 2 tokens of a prompt and draws 5.


def asked(world, count=1):
    return anext(world.stream(count))


def test_an_interactive_call_over_the_tokens_of_the_day_is_refused_until_midnight():
    async def scenario():
        world = SamplingWorld(FakeSampler(), begin=EVENING, p=ProjectPolicy(tokens_per_day=14))
        async with world.running():
            for _ in range(2):
                await world.collected(1)
            with pytest.raises(QuotaExceeded) as caught:
                await asked(world)
            context = caught.value.context
            assert (context["project"], context["quota"]) == ("p", "tokens_per_day")
            assert (context["value"], context["allowed"]) == ("14", "14")
            assert caught.value.retry_after_s == pytest.approx(DAY_S - world.now())
            await asyncio.sleep(caught.value.retry_after_s)
            await world.collected(1)

    simulate(scenario())


def test_a_call_that_waits_when_the_day_is_used_up_is_refused_and_not_kept_till_midnight():
    async def scenario():
        policy = ProjectPolicy(tokens_per_day=100)
        world = SamplingWorld(FakeSampler(), bound=1, begin=EVENING, p=policy)
        async with world.running() as tasks:
            first = tasks.create_task(world.collected(1))
            await asyncio.sleep(0)
            # As if what runs had turned out longer than was expected.
            later = asyncio.get_running_loop().call_later
            later(0.5, lambda: world.scheduler.restore_usage("p", 0, 98))
            with pytest.raises(QuotaExceeded) as caught:
                await world.collected(1)
            assert first.done(), "it waited"
            assert caught.value.context["quota"] == "tokens_per_day"
            assert world.now() < EVENING + 30
            await first

    simulate(scenario())


def test_a_jobs_request_over_the_tokens_of_the_day_waits_for_the_next_one():
    async def scenario():
        world = SamplingWorld(FakeSampler(), begin=EVENING, p=ProjectPolicy(tokens_per_day=7))
        keeper = keeper_of(world, Usage())
        async with world.running() as tasks:
            keeping = tasks.create_task(keeper.run())
            await world.sample(1, job=JOB)
            waiting = tasks.create_task(world.sample(1, job=JOB))
            await asyncio.sleep(90)
            assert not waiting.done()
            (told,) = world.scheduler.explain("p", "", world.now()).waiting
            assert told.rule == "PROJECT_TOKENS_PER_DAY"
            await waiting
            assert DAY_S < world.now() <= DAY_S + INTERVAL_S + 5.2
            keeping.cancel()
        assert world.losses == []

    simulate(scenario())


def test_what_had_a_place_goes_on_over_the_tokens_of_the_day():
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        world = SamplingWorld(first, second, p=ProjectPolicy(tokens_per_day=3))
        async with world.running() as tasks:
            request = tasks.create_task(world.collected(1))
            await asyncio.sleep(2.5)
            first.die()
            assert sum(len(chunk.token_ids) for chunk in await request) == 5
            assert second.begun == 1

    simulate(scenario())


def test_tokens_in_flight_refuse_an_interactive_call_and_make_a_jobs_wait():
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler, p=ProjectPolicy(max_tokens_in_flight=100))
        async with world.running() as tasks:
            first = tasks.create_task(world.sample(1, job=JOB))
            await asyncio.sleep(0.5)
            with pytest.raises(QuotaExceeded) as caught:
                await asked(world)
            assert caught.value.context["quota"] == "tokens_in_flight"
            assert caught.value.retry_after_s > 0
            second = tasks.create_task(world.sample(1, job=JOB))
            other = tasks.create_task(world.sample(1, project="q"))
            await asyncio.gather(first, second, other)
            assert sampler.most_running == 2
        assert world.losses == []

    simulate(scenario())


def test_a_jobs_log_probabilities_wait_as_its_samples_do_and_an_interactive_call_does_not():
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler, begin=EVENING, p=ProjectPolicy(tokens_per_day=7))
        keeper = keeper_of(world, Usage())

        async def lost(problem):
            world.losses.append(problem)

        async def judged(**options):
            return await world.sampling.compute_logprobs("p", "tiny", SOURCE, [1, 2], **options)

        async with world.running() as tasks:
            keeping = tasks.create_task(keeper.run())
            await world.sample(1, job=JOB)
            with pytest.raises(QuotaExceeded):
                await judged()
            waiting = tasks.create_task(judged(job=JOB, lost=lost))
            await asyncio.sleep(80)
            assert not waiting.done()
            (told,) = world.scheduler.explain("p", JOB, world.now()).waiting
            assert (told.job, told.rule) == (JOB, "PROJECT_TOKENS_PER_DAY")
            sampler.die()
            await asyncio.sleep(100)
            assert world.losses == ["no sampler of 'tiny' serves now"]
            with pytest.raises(Unavailable):
                await judged()
            sampler.revive()
            assert (await waiting).logprobs == (1.0, 2.0)
            keeping.cancel()

    simulate(scenario())


class Usage:
    """A store that is away at times."""

    def __init__(self):
        self.away = False
        self.written = {}

    async def add(self, tokens):
        await asyncio.sleep(0)
        if self.away:
            raise Unavailable("the database does not answer")
        for key, (prompt, drawn) in tokens.items():
            prompts, drawns = self.written.get(key, (0, 0))
            self.written[key] = prompts + prompt, drawns + drawn

    async def of(self, day):
        return {project: tokens for (project, at), tokens in self.written.items() if at == day}

    async def forget(self, *, before):
        self.written = {key: tokens for key, tokens in self.written.items() if key[1] >= before}


def keeper_of(world, store):
    return UsageKeeper(
        store,
        world.scheduler,
        dispatch=world.sampling.dispatch,
        clock=world.now,
    )


def test_usage_survives_a_restart_up_to_the_interval_and_wholly_if_it_was_no_kill():
    async def scenario():
        store = Usage()
        policy = ProjectPolicy(tokens_per_day=21)
        world = SamplingWorld(FakeSampler(token_s=0.1), p=policy)
        async with world.running() as tasks:
            keeping = tasks.create_task(keeper_of(world, store).run())
            await world.sample(2)
            await asyncio.sleep(INTERVAL_S)
            assert store.written == {("p", 0): (2, 10)}
            await world.sample(1)
            killed = dict(store.written)
            keeping.cancel()
        assert killed == {("p", 0): (2, 10)}
        assert store.written == {("p", 0): (4, 15)}

        second = SamplingWorld(FakeSampler(), p=policy)
        await keeper_of(second, store).restore()
        async with second.running():
            assert second.scheduler.used_today("p", second.now()) == 19
            await second.collected(1)
            with pytest.raises(QuotaExceeded, match="26"):
                await asked(second)

    simulate(scenario())


def test_usage_that_the_store_did_not_take_is_written_once_it_does():
    async def scenario():
        store = Usage()
        world = SamplingWorld(FakeSampler())
        async with world.running() as tasks:
            keeping = tasks.create_task(keeper_of(world, store).run())
            store.away = True
            await world.sample(1)
            await asyncio.sleep(3 * INTERVAL_S)
            await world.sample(1)
            store.away = False
            await asyncio.sleep(2 * INTERVAL_S)
            assert store.written == {("p", 0): (4, 10)}
            keeping.cancel()
        assert store.written == {("p", 0): (4, 10)}

    simulate(scenario())


def test_past_days_are_forgotten_after_a_while():
    async def scenario():
        store = Usage()
        store.written = {("p", 0): (1, 1), ("p", 1): (1, 1)}
        world = SamplingWorld(FakeSampler(), begin=DAYS_KEPT * DAY_S + EVENING)
        async with asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(keeper_of(world, store).run())
            await asyncio.sleep(90)
            assert len(store.written) == 2
            await asyncio.sleep(20)
            assert store.written == {("p", 1): (1, 1)}
            keeping.cancel()

    simulate(scenario())
