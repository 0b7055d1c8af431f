"""Versions made live on all samplers before they are asked for, in virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from rollmesh.errors import DigestMismatch, InvalidRequest, NotFound, SourceUnavailable
from services.coordinator.loading import LOAD_WAIT_S
from tests.fakes.fleet import SOURCE, SamplingWorld
from tests.fakes.samplers import FakeSampler
from tests.fakes.virtual_time import simulate

NEWER = replace(SOURCE, policy_version=4, digest="d4")


def test_load_makes_a_version_live_on_every_sampler_that_serves_and_waits_for_no_other():
    async def scenario():
        here, away, dies, other = (FakeSampler() for _ in range(4))
        away.alive = False
        other.base_model = "other"
        world = SamplingWorld(here, away, dies)
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
        sampler.load_fault = InvalidRequest("a rank that no sampler takes")
        world = SamplingWorld(sampler, FakeSampler())
        async with world.running():
            with pytest.raises(InvalidRequest):
                await world.sampling.load("tiny", SOURCE)

    simulate(scenario())


@pytest.mark.parametrize("error", [DigestMismatch, NotFound, SourceUnavailable])
def test_what_one_sampler_cannot_have_is_left_to_first_use(error):
    async def scenario():
        wrong, right = FakeSampler(), FakeSampler()
        wrong.load_fault = error("not what was asked for")
        world = SamplingWorld(wrong, right)
        async with world.running():
            await world.sampling.load("tiny", SOURCE)
            assert (len(wrong.loaded), len(right.loaded)) == (0, 1)
            assert world.serving == ["s0", "s1"]

    simulate(scenario())


def test_a_sampler_that_takes_long_is_left_to_first_use():
    async def scenario():
        quick, slow = FakeSampler(), FakeSampler()
        slow.load_s = 1000
        world = SamplingWorld(quick, slow)
        async with world.running():
            await world.sampling.load("tiny", SOURCE)
            assert asyncio.get_running_loop().time() == LOAD_WAIT_S
            assert (len(quick.loaded), len(slow.loaded)) == (1, 0)
            assert world.serving == ["s0", "s1"]

    simulate(scenario())


def test_an_error_is_told_although_another_sampler_takes_long():
    async def scenario():
        wrong, slow = FakeSampler(), FakeSampler()
        wrong.load_fault = InvalidRequest("a rank that no sampler takes")
        slow.load_s = 1000
        world = SamplingWorld(wrong, slow)
        async with world.running():
            with pytest.raises(InvalidRequest):
                await world.sampling.load("tiny", SOURCE)

    simulate(scenario())


def test_a_version_is_waited_for_no_more_when_a_newer_one_is_loaded():
    async def scenario():
        sampler = FakeSampler()
        sampler.load_s = 5
        world = SamplingWorld(sampler)
        clock = asyncio.get_running_loop().time
        ended = {}

        async def load(source):
            await world.sampling.load("tiny", source)
            ended.setdefault((source.adapter[-1], source.policy_version), []).append(clock())

        other = replace(SOURCE, adapter="projects/p/adapters/b", policy_version=1)
        async with world.running() as tasks:
            for source in (SOURCE, SOURCE, other):
                tasks.create_task(load(source))
            await asyncio.sleep(1)
            tasks.create_task(load(NEWER))
            await asyncio.sleep(1)
            tasks.create_task(load(SOURCE))
            await asyncio.sleep(1)
            assert ended == {("a", 3): [1, 1, 2]}
            await asyncio.sleep(10)
            assert ended == {("a", 3): [1, 1, 2], ("a", 4): [6], ("b", 1): [5]}
            assert sampler.loaded == {(NEWER.adapter, 4), (other.adapter, 1)}
            await load(SOURCE)
            assert ended["a", 3][3:] == [18], "nothing newer is under way any more"

    simulate(scenario())
