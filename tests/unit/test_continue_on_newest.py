"""Completions that move to newer versions while they are drawn, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

from rollmesh.errors import InvalidRequest
from rollmesh.types import Continuation, SamplingParams
from services.coordinator.attempts import BORDER_S
from services.coordinator.newest import Newest, Publications
from tests.fakes.fleet import SOURCE, SamplingWorld, at
from tests.fakes.samplers import FakeSampler, drawn
from tests.fakes.virtual_time import simulate


def version(number):
    return replace(SOURCE, policy_version=number, digest=f"d{number}")


def announcing(newest, number):
    return lambda: newest.announce(version(number))


def spans_of(completion):
    for span in completion.spans:
        assert span.digest == f"d{span.policy_version}"
    return [(span.policy_version, span.num_tokens) for span in completion.spans]


@pytest.mark.parametrize("after_s", [0.5, 1.5, 2.5, 3.5])
def test_a_completion_moves_at_the_border_of_a_chunk_and_its_spans_say_where(after_s):
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler)
        newest = Newest(SOURCE)
        async with world.running() as tasks:
            tasks.create_task(at(after_s, announcing(newest, 4)))
            first, second = await world.sample(2, newest=newest)
            had = int(after_s)
            assert first.token_ids == drawn(7, 0)
            assert second.token_ids == drawn(7, 1)
            assert spans_of(first) == [(3, had + 1), (4, 4 - had)]
            assert spans_of(second) == ([(3, had)] if had else []) + [(4, 5 - had)]
            assert [asked[0] for asked in sampler.asked] == [SOURCE, version(4)]
            assert sampler.asked[1][3] == (
                Continuation(0, drawn(7, 0)[: had + 1]),
                Continuation(1, drawn(7, 1)[:had]),
            )
            assert len(world.fleet.samplers("tiny")) == 1, "nobody was lost"

    simulate(scenario())


@pytest.mark.parametrize("through", ["sample", "stream"])
def test_a_long_completion_follows_every_version_and_none_lags_by_more_than_a_chunk(through):
    async def scenario():
        world = SamplingWorld(FakeSampler(num_tokens=40), FakeSampler(num_tokens=40))
        newest = Newest(SOURCE)
        seen = []
        async with world.running() as tasks:
            for number in range(4, 12):
                tasks.create_task(at(4 * number + 0.5, announcing(newest, number)))
            if through == "sample":
                completions = await world.sample(2, newest=newest)
                for number, completion in enumerate(completions):
                    assert completion.token_ids == drawn(7, number, 40)
                    versions = [number for number, _ in spans_of(completion)]
                    assert versions == sorted(set(versions)) == list(range(3, versions[-1] + 1))
            else:
                known = newest.source.policy_version
                async for chunk in world.stream(1, newest=newest):
                    seen.append(chunk.spans[0].policy_version)
                    assert seen[-1] >= known, "drawn by a version that was older a chunk ago"
                    known = newest.source.policy_version
                assert seen == sorted(seen)
                assert len(set(seen)) > 5

    simulate(scenario())


def test_a_completion_that_gets_no_chunk_for_a_while_moves_without_one():
    async def scenario():
        sampler = FakeSampler(token_s=100, num_tokens=1)
        world = SamplingWorld(sampler)
        newest = Newest(SOURCE)
        async with world.running() as tasks:
            tasks.create_task(at(10, announcing(newest, 4)))
            (completion,) = await world.sample(1, newest=newest)
            assert spans_of(completion) == [(4, 1)]
            assert asyncio.get_running_loop().time() == 110 + BORDER_S

    simulate(scenario())


def test_a_chunk_makes_the_next_move_as_quick_as_the_first():
    async def scenario():
        sampler = FakeSampler(token_s=100, num_tokens=2)
        world = SamplingWorld(sampler)
        newest = Newest(SOURCE)
        async with world.running() as tasks:
            for number, after_s in enumerate([10, 120, 130], start=4):
                tasks.create_task(at(after_s, announcing(newest, number)))
            (completion,) = await world.sample(1, newest=newest)
            assert spans_of(completion) == [(4, 1), (6, 1)]
            assert asyncio.get_running_loop().time() == 130 + BORDER_S + 100

    simulate(scenario())


def test_versions_that_come_faster_than_any_chunk_do_not_keep_it_from_coming():
    async def scenario():
        sampler = FakeSampler(token_s=10 * BORDER_S)
        world = SamplingWorld(sampler)
        newest = Newest(SOURCE)

        async def publish():
            for number in range(4, 10_000):
                newest.announce(version(number))
                await asyncio.sleep(BORDER_S / 5)

        async with world.running() as tasks:
            publishing = tasks.create_task(publish())
            (completion,) = await world.sample(1, newest=newest)
            assert completion.token_ids == drawn(7, 0)
            assert not publishing.done()
            publishing.cancel()

    simulate(scenario())


def test_a_request_that_waited_begins_with_what_is_newest_when_its_turn_comes():
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler, bound=1)
        newest = Newest(SOURCE)
        async with world.running() as tasks:
            running = tasks.create_task(world.sample(1))
            await asyncio.sleep(1)
            waiting = tasks.create_task(world.sample(1, newest=newest))
            await asyncio.sleep(1)
            newest.announce(version(5))
            assert spans_of((await waiting)[0]) == [(5, 5)]
            await running
            assert sampler.begun == 2

    simulate(scenario())


def test_a_move_keeps_the_place_and_the_sampler():
    async def scenario():
        first, second = FakeSampler(), FakeSampler(num_tokens=100)
        world = SamplingWorld(first, second, bound=1)
        newest = Newest(SOURCE)
        async with world.running() as tasks:
            moving = tasks.create_task(world.sample(1, newest=newest))
            await asyncio.sleep(0)
            tasks.create_task(world.sample(1))
            await asyncio.sleep(0)
            waiting = tasks.create_task(world.sample(1))
            await asyncio.sleep(2.5)
            newest.announce(version(4))
            (moved,) = await moving
            assert spans_of(moved) == [(3, 3), (4, 2)]
            assert {span.sampler for span in moved.spans} == {"s0-1"}
            assert not waiting.done()

    simulate(scenario())


def test_a_lost_completion_goes_on_elsewhere_with_the_newest_version():
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        world = SamplingWorld(first, second)
        newest = Newest(SOURCE)
        async with world.running() as tasks:
            tasks.create_task(at(2.4, first.die))
            tasks.create_task(at(2.45, announcing(newest, 4)))
            (completion,) = await world.sample(1, newest=newest)
            assert completion.token_ids == drawn(7, 0)
            assert [(s.sampler, s.policy_version, s.num_tokens) for s in completion.spans] == [
                ("s0-1", 3, 2),
                ("s1-1", 4, 3),
            ]

    simulate(scenario())


def test_every_call_pulls_from_where_the_adapter_is_by_now():
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(
            sampler, locate=lambda source: replace(source, trainer_address="another")
        )
        newest = Newest(SOURCE)
        async with world.running() as tasks:
            tasks.create_task(at(2.5, announcing(newest, 4)))
            await world.sample(1, newest=newest)
            assert [asked[0].trainer_address for asked in sampler.asked] == ["another", "another"]

    simulate(scenario())


@pytest.mark.parametrize("constraint", [{"regex": "a"}, {"json_schema": "{}"}])
@pytest.mark.parametrize("through", ["sample", "stream"])
def test_what_has_a_constraint_cannot_move(constraint, through):
    async def scenario():
        world = SamplingWorld(FakeSampler())
        async with world.running():
            params = SamplingParams(**constraint)
            draw = world.sample if through == "sample" else world.collected
            with pytest.raises(InvalidRequest, match="continue_on_newest") as caught:
                await draw(1, params=params, newest=Newest(SOURCE))
            assert caught.value.context["field"] == "continue_on_newest"

    simulate(scenario())


@pytest.mark.parametrize("after_s", [2.4, 2.6, 3.0, 3.4])
def test_cancelling_around_a_move_leaves_nothing_behind(after_s):
    async def scenario():
        sampler = FakeSampler(token_s=2)
        world = SamplingWorld(sampler)
        newest = Newest(SOURCE)
        async with world.running() as tasks:
            tasks.create_task(at(2.5, announcing(newest, 4)))
            call = tasks.create_task(world.sample(1, newest=newest))
            await asyncio.sleep(after_s)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call
            assert sampler.aborted == sampler.begun

    simulate(scenario())


def test_who_follows_hears_of_the_first_newer_version_and_of_nothing_else():
    newest = Newest(SOURCE)
    heard = []
    with newest.noticing(lambda: heard.append(newest.source.policy_version)):
        newest.announce(version(3))
        newest.announce(version(2))
        assert heard == []
        newest.announce(version(5))
        newest.announce(version(6))
        assert heard == [5]
    with newest.noticing(lambda: heard.append(0)):
        pass
    newest.announce(version(7))
    assert heard == [5]


def test_publications_know_of_the_adapters_that_somebody_follows_and_forget_the_others():
    publications = Publications()
    publications.announce(version(9))
    newest = publications.follow(SOURCE.adapter)
    newest.announce(SOURCE)
    assert newest.source == SOURCE, "what was announced before is not kept"
    assert publications.follow(SOURCE.adapter) is newest
    publications.announce(version(4))
    assert newest.source == version(4)
    publications.announce(replace(version(8), adapter="projects/p/adapters/b"))
    publications.announce(version(5))
    publications.announce(version(3))
    assert newest.source == version(5)
    del newest
    newest = publications.follow(SOURCE.adapter)
    newest.announce(SOURCE)
    assert newest.source == SOURCE


def test_who_followed_a_deleted_adapter_hears_nothing_of_the_next_one_of_its_name():
    publications = Publications()
    before = publications.follow(SOURCE.adapter)
    publications.announce(version(50))
    publications.forget(SOURCE.adapter)
    publications.forget("projects/p/adapters/unknown")
    publications.announce(version(0))
    after = publications.follow(SOURCE.adapter)
    assert after is not before
    after.announce(version(0))
    publications.announce(version(1))
    publications.announce(version(51))
    assert before.source == version(50)
    assert after.source == version(51)
    publications.forget(SOURCE.adapter)
    again = publications.follow(SOURCE.adapter)
    publications.announce(version(2))
    assert (before.source, after.source) == (version(50), version(51))
    assert again.source == version(2)
