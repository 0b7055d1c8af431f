"""Membership by polling, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from rollmesh.errors import Unavailable
from rollmesh.types import Fleet, TrainerInfo
from services.coordinator.fleet.limits import Limits
from services.coordinator.fleet.static import POLL_INTERVAL_S, POLL_TIMEOUT_S, StaticFleet
from tests.fakes.fleet import until
from tests.fakes.samplers import FakeSampler
from tests.fakes.virtual_time import simulate


class FakeTrainer:
    hangs = False

    async def get_trainer(self):
        if self.hangs:
            await asyncio.Event().wait()
        return TrainerInfo("tiny", 100, 512, 64, 3, 8, ("q_proj",), 4)


class FakeReward:
    async def list_environments(self):
        return []


def fleet_of(trainer=None, sampler=None):
    return StaticFleet(
        trainers={"t": trainer or FakeTrainer()},
        samplers={"s": sampler or FakeSampler()},
        rewards={"r": FakeReward()},
        clock=lambda: 17.0,
    )


def problem(fleet):
    return fleet.snapshot(0).members[1].problem


def in_running_fleet(fleet, scenario):
    async def run():
        async with asyncio.TaskGroup() as tasks:
            polling = tasks.create_task(fleet.run())
            await scenario()
            polling.cancel()

    simulate(run())


def test_a_member_serves_from_its_first_good_poll_on():
    fleet = fleet_of()
    assert (fleet.trainers("tiny"), fleet.samplers("tiny"), fleet.base_models()) == ([], [], [])
    assert {member.problem for member in fleet.snapshot(0).members} == {"not heard of yet"}

    async def scenario():
        await until(fleet, lambda: all(member.serving for member in fleet.snapshot(0).members))
        assert [member.address for member in fleet.samplers("tiny")] == ["s"]
        assert fleet.samplers("other") == []
        assert fleet.base_models() == ["tiny"]

    in_running_fleet(fleet, scenario)


def test_a_snapshot_lists_every_member_by_role_and_address():
    fleet = fleet_of()

    async def scenario():
        await asyncio.sleep(1)
        snapshot = fleet.snapshot(4)
        assert isinstance(snapshot, Fleet)
        assert snapshot.num_queued_requests == 4
        trainer, sampler, reward = snapshot.members
        assert (trainer.role, sampler.role, reward.role) == ("trainer", "sampler", "reward")
        assert (trainer.num_adapters, trainer.base_model) == (3, "tiny")
        assert (sampler.backend, sampler.base_model) == ("fake", "tiny")
        assert all(member.serving and member.update_time == 17.0 for member in snapshot.members)

    in_running_fleet(fleet, scenario)


def test_a_suspected_member_is_out_at_once_and_back_with_its_next_good_poll():
    sampler = FakeSampler()
    fleet = fleet_of(sampler=sampler)

    async def scenario():
        await until(fleet, lambda: bool(fleet.samplers("tiny")))
        sampler.die()
        fleet.suspect(fleet.samplers("tiny")[0], "reset by peer")
        assert fleet.samplers("tiny") == []
        assert fleet.snapshot(0).members[1].problem == "reset by peer"
        assert fleet.base_models() == ["tiny"], "known, though nobody serves it now"
        await asyncio.sleep(10)
        assert fleet.samplers("tiny") == []
        assert fleet.snapshot(0).members[1].problem == "connection refused"
        sampler.revive()
        revived = asyncio.get_running_loop().time()
        await until(fleet, lambda: bool(fleet.samplers("tiny")))
        assert asyncio.get_running_loop().time() - revived <= POLL_INTERVAL_S

    in_running_fleet(fleet, scenario)


def test_a_member_that_was_suspected_wrongly_is_back_without_waiting_for_the_next_interval():
    fleet = fleet_of()

    async def scenario():
        await until(fleet, lambda: bool(fleet.samplers("tiny")))
        now = asyncio.get_running_loop().time()
        fleet.suspect(fleet.samplers("tiny")[0], "its trainer is away")
        await until(fleet, lambda: bool(fleet.samplers("tiny")))
        assert asyncio.get_running_loop().time() == now

    in_running_fleet(fleet, scenario)


def test_a_member_that_hangs_is_out_and_does_not_hold_up_the_others():
    trainer = FakeTrainer()
    fleet = fleet_of(trainer)

    async def scenario():
        await until(fleet, lambda: bool(fleet.trainers("tiny")))
        trainer.hangs = True
        await asyncio.sleep(POLL_TIMEOUT_S + 2 * POLL_INTERVAL_S)
        assert fleet.trainers("tiny") == []
        assert "no answer" in fleet.snapshot(0).members[0].problem
        assert fleet.samplers("tiny")
        trainer.hangs = False
        await until(fleet, lambda: bool(fleet.trainers("tiny")))

    in_running_fleet(fleet, scenario)


@pytest.mark.parametrize("loss", ["die", "stall"])
@pytest.mark.parametrize("phase_s", [0.0, 0.1, 0.2, 0.3, 0.4])
def test_a_sampler_that_is_lost_is_out_within_two_seconds_although_nobody_samples(loss, phase_s):
    sampler = FakeSampler()
    fleet = fleet_of(sampler=sampler)

    async def scenario():
        await asyncio.sleep(10 + phase_s)
        assert fleet.samplers("tiny")
        getattr(sampler, loss)()
        await asyncio.sleep(2)
        assert not fleet.samplers("tiny")
        sampler.revive()
        await asyncio.sleep(2)
        assert fleet.samplers("tiny")

    in_running_fleet(fleet, scenario)


@pytest.mark.parametrize("phase_s", [0.0, 0.1, 0.2, 0.3, 0.4])
def test_a_trainer_that_stalls_is_out_within_two_seconds_too(phase_s):
    trainer = FakeTrainer()
    fleet = fleet_of(trainer)

    async def scenario():
        await asyncio.sleep(10 + phase_s)
        assert fleet.trainers("tiny")
        trainer.hangs = True
        await asyncio.sleep(2)
        assert not fleet.trainers("tiny")

    in_running_fleet(fleet, scenario)


def test_a_sampler_that_drains_is_given_no_more_work_and_is_not_lost():
    sampler = FakeSampler()
    fleet = fleet_of(sampler=sampler)

    async def scenario():
        await until(fleet, lambda: bool(fleet.samplers("tiny")))
        (member,) = fleet.samplers("tiny")
        sampler.draining = True
        await until(fleet, lambda: not fleet.samplers("tiny"))
        assert member.serving
        assert (fleet.snapshot(0).members[1].serving, problem(fleet)) == (True, "draining")
        assert "no sampler" in fleet.unserved("tiny")
        sampler.die()
        await asyncio.sleep(1)
        assert (member.serving, problem(fleet)) == (False, "connection refused")

    in_running_fleet(fleet, scenario)


def test_a_coordinator_that_was_busy_itself_does_not_blame_its_members():
    class Slow(FakeSampler):
        async def get_sampler(self):
            await asyncio.sleep(0.2)  # Longer than the loop is ever free in a row below.
            return await super().get_sampler()

    fleet = fleet_of(sampler=Slow())
    lost = []

    async def scenario():
        loop = asyncio.get_running_loop()
        await asyncio.sleep(10)
        fleet.on_change(lambda: lost.append(1) if not fleet.samplers("tiny") else None)
        for _ in range(100):
            await asyncio.sleep(0.13)
            loop.busy(30)
        assert lost == []

    in_running_fleet(fleet, scenario)


def test_a_sampler_that_a_job_refuses_serves_all_others_and_says_so():
    sampler = FakeSampler()
    fleet = fleet_of(sampler=sampler)

    async def scenario():
        await asyncio.sleep(1)
        fleet.refuse("red", "another", "it drifts")
        assert fleet.samplers("tiny", job="red")
        heard = []
        fleet.on_change(lambda: heard.append(len(fleet.samplers("tiny", job="red"))))
        fleet.refuse("red", sampler.instance_id, "it drifts")
        assert problem(fleet) == "in quarantine for 1 job: it drifts"
        fleet.refuse("green", sampler.instance_id, "it drifts a lot")
        assert problem(fleet) == "in quarantine for 2 jobs: it drifts a lot"
        assert not fleet.samplers("tiny", job="red")
        assert not fleet.samplers("tiny", job="green")
        assert fleet.samplers("tiny", job="blue") == fleet.samplers("tiny") != []
        assert "in quarantine for red" in fleet.unserved("tiny", job="red")
        assert fleet.unserved("tiny", job="blue") == ""
        fleet.forgive("green")
        assert problem(fleet) == "in quarantine for 1 job: it drifts"
        assert fleet.samplers("tiny", job="green")
        fleet.forgive("blue")
        assert heard == [0, 0, 0]
        fleet.suspect(fleet.samplers("tiny")[0], "reset")
        assert problem(fleet) == "reset"
        assert fleet.unserved("tiny", job="red") == "no sampler of 'tiny' serves now"
        await asyncio.sleep(1)
        assert problem(fleet) == "in quarantine for 1 job: it drifts"
        sampler.die()
        sampler.revive()
        await asyncio.sleep(2)
        assert fleet.samplers("tiny", job="red")
        assert problem(fleet) == ""
        fleet.refuse("red", sampler.instance_id, "it drifts")
        del heard[:]
        fleet.forgive("red")
        assert heard == [1]

    in_running_fleet(fleet, scenario)


def test_a_sampler_in_quarantine_is_out_until_another_process_is_there():
    sampler = FakeSampler()
    fleet = fleet_of(sampler=sampler)

    async def scenario():
        await asyncio.sleep(1)
        fleet.quarantine("another", "it lies")
        assert fleet.samplers("tiny")
        heard = []
        fleet.on_change(lambda: heard.append(len(fleet.samplers("tiny"))))
        fleet.quarantine(sampler.instance_id, "it lies")
        assert heard == [0]
        assert fleet.snapshot(0).members[1].problem == "quarantined: it lies"
        await asyncio.sleep(100)
        sampler.die()
        await asyncio.sleep(5)
        sampler.alive = True  # It was not dead: only out of reach.
        sampler._died.clear()
        await asyncio.sleep(5)
        assert heard == [0]
        assert fleet.snapshot(0).members[1].problem == "quarantined: it lies"
        sampler.revive()
        await asyncio.sleep(1)
        assert heard == [0, 1]
        assert fleet.snapshot(0).members[1].problem == ""
        fleet.suspect(fleet.samplers("tiny")[0], "reset")
        await asyncio.sleep(1)
        assert fleet.samplers("tiny"), "the quarantine is over"

    in_running_fleet(fleet, scenario)


def test_a_limit_runs_only_while_something_is_amiss_and_from_when_that_began():
    sampler = FakeSampler()
    fleet = fleet_of(sampler=sampler)
    limits = Limits(fleet)

    async def scenario():
        await asyncio.sleep(1)
        clock = asyncio.get_running_loop().time

        def is_amiss():
            return not fleet.samplers("tiny")

        async def limited(awaited):
            async with limits.amiss(is_amiss, for_s=10, error=Unavailable("away")):
                await awaited

        async def comes_back():
            await asyncio.sleep(100)
            sampler.die()
            await asyncio.sleep(9)
            sampler.revive()
            await asyncio.sleep(100)

        async def something_else_changes():
            await asyncio.sleep(4)
            fleet.suspect(fleet.trainers("tiny")[0], "a trainer is lost")
            await asyncio.Event().wait()

        await limited(comes_back())
        sampler.die()
        await asyncio.sleep(5)
        began = clock()
        with pytest.raises(Unavailable, match="away"):
            await limited(something_else_changes())
        assert clock() == began + 10

    in_running_fleet(fleet, scenario)


def test_listeners_hear_of_changes_and_of_nothing_else():
    sampler = FakeSampler()
    fleet = fleet_of(sampler=sampler)
    heard = []
    fleet.on_change(lambda: heard.append(len(fleet.samplers("tiny"))))

    async def scenario():
        await asyncio.sleep(5)
        assert len(heard) == 3, "each of three members has come once"
        sampler.loaded.add(("projects/p/adapters/a", 0))
        await asyncio.sleep(1)
        assert len(heard) == 4
        sampler.die()
        await asyncio.sleep(5)
        assert heard[4:] == [0]

    in_running_fleet(fleet, scenario)


def test_an_error_that_is_no_failure_of_the_member_ends_the_fleet():
    class Broken(FakeTrainer):
        async def get_trainer(self):
            raise ZeroDivisionError

    async def scenario():
        with pytest.RaisesGroup(ZeroDivisionError):
            async with asyncio.timeout(10):
                await fleet_of(Broken()).run()

    simulate(scenario())
