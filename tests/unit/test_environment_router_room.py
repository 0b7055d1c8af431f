"""Who is called where, who waits, and what is tried again: in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from rollmesh import chat
from rollmesh.errors import (
    EnvironmentFailed,
    EnvironmentUnavailable,
    InternalError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from services.reward.environments.breaker import Breaker
from services.reward.environments.config import BreakerConfig, EnvironmentConfig
from services.reward.environments.room import MOST_UNHEARD
from services.reward.environments.run import Kind
from services.reward.environments.watch import SUSPECT_PAUSE_S
from tests.fakes.replicas import FakeServer, World, settled


def test_calls_go_where_least_is_under_way_in_turns():
    servers = FakeServer(), FakeServer(), FakeServer()
    world = World(*servers)

    async def scenario():
        await world.serves(3)
        calls = []
        for number in range(6):
            calls.append(world.score(f"{number}"))
            await settled()
        assert [len(server.scoring) for server in servers] == [2, 2, 2]
        servers[1].release("1")
        await calls[1]
        world.score("next")
        await settled()
        assert servers[1].scoring == ["4", "next"]
        for call in calls:
            call.cancel()

    world.play(scenario)


def test_calls_that_wait_begin_in_the_order_in_which_they_came():
    server = FakeServer()
    world = World(server, max_concurrent=1)

    async def scenario():
        await world.serves()
        calls = []
        for who in "abcdef":
            calls.append(world.score(who))
            await settled()
        assert (world.status.num_running, world.status.num_waiting) == (1, 5)
        calls[2].cancel()
        for who in "abdef":
            server.release(who)
        await asyncio.wait(calls)
        assert server.begun == list("abdef")
        assert (world.status.num_running, world.status.num_waiting) == (0, 0)

    world.play(scenario)


def test_one_call_more_than_may_wait_is_refused_with_how_many_do():
    server = FakeServer()
    world = World(server, max_concurrent=1, max_waiting=2)

    async def scenario():
        await world.serves()
        calls = [world.score(who) for who in "abc"]
        await settled()
        with pytest.raises(Overloaded) as raised:
            await world.score("d")
        assert raised.value.context["value"] == raised.value.context["allowed"] == "2"
        assert raised.value.retry_after_s > 0
        for who in "abc":
            server.release(who)
        await asyncio.gather(*calls)

    world.play(scenario)


def test_calls_that_come_at_once_are_sent_little_by_little_and_none_is_refused_for_that():
    server = FakeServer()
    world = World(server, max_waiting=0, max_concurrent=1000)

    async def scenario():
        await world.serves()
        calls = [world.score("a") for _ in range(1000)]
        await settled()
        assert len(server.scoring) == MOST_UNHEARD
        with pytest.raises(Overloaded):
            await world.score("a")
        polls = server.num_polls
        await world.until(lambda: len(server.scoring) == 1000)
        assert server.num_polls - polls >= 3, "each answered poll says that the server keeps up"
        server.release("a")
        await asyncio.gather(*calls)

    world.play(scenario)


def test_answers_make_room_for_further_calls_without_a_poll():
    server = FakeServer()
    world = World(server)
    server.release("a")

    async def scenario():
        await world.serves()
        polls = server.num_polls
        await asyncio.gather(*(world.score("a") for _ in range(1000)))
        assert server.num_polls - polls <= 1

    world.play(scenario)


def test_a_call_that_is_given_up_as_it_gets_its_place_gives_it_back():
    server = FakeServer()
    world = World(server, max_concurrent=1)
    admission = world.environment._admission

    async def scenario():
        await world.serves()
        first = await admission.enter(Kind.SCORE)
        second = asyncio.ensure_future(admission.enter(Kind.SCORE))
        third = asyncio.ensure_future(admission.enter(Kind.SCORE))
        await settled()
        first.give_back()
        # The place is the second's now, though it has not run since.
        assert not second.done()
        second.cancel()
        (await third).give_back()
        assert second.cancelled()
        assert (world.status.num_running, world.status.num_waiting) == (0, 0)

    world.play(scenario)


def test_a_batch_that_is_cut_up_is_one_of_those_that_wait_however_large():
    server = FakeServer(limits=chat.Limits(max_score_batch=1))
    world = World(server, max_concurrent=2, max_waiting=2)

    async def scenario():
        await world.serves()
        large = world.score(*(f"{number}" for number in range(20)))
        await settled()
        assert (world.status.num_running, world.status.num_waiting) == (2, 1)
        small = world.score("small")
        await settled()
        for number in range(20):
            server.release(f"{number}")
        server.release("small")
        assert len(await large) == 20
        assert len(await small) == 1
        assert server.begun.index("small") <= 4

    world.play(scenario)


def test_a_part_that_fails_ends_the_others():
    server = FakeServer(limits=chat.Limits(max_score_batch=1))
    world = World(server)
    server.raises["b"] = InternalError("boom")

    async def scenario():
        await world.serves()
        with pytest.raises(EnvironmentFailed, match="boom"):
            await world.score("a", "b", "c")
        assert server.scoring == []
        assert world.status.num_running == 0

    world.play(scenario)


# --- tries ----------------------------------------------------------------------------------------


def test_a_call_that_is_unavailable_at_one_replica_is_tried_at_another():
    first, second = FakeServer(), FakeServer()
    world = World(first, second)
    first.raises["a"] = second.raises["b"] = Unavailable("reset by peer")
    first.release("b")
    second.release("a")

    async def scenario():
        await world.serves(2)
        for who in "ab":
            assert len(await world.score(who)) == 1
        assert "a" in second.begun
        assert "b" in first.begun

    world.play(scenario)


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_call_is_tried_as_often_as_configured(attempts):
    server = FakeServer()
    world = World(server, attempts=attempts)
    server.raises["a"] = Unavailable("reset by peer")

    async def scenario():
        await world.serves()
        with pytest.raises(EnvironmentUnavailable, match="reset by peer"):
            await world.score("a")
        assert server.begun == ["a"] * attempts
        await world.serves()

    world.play(scenario)


def test_a_replica_that_fails_calls_is_not_polled_without_pause():
    server = FakeServer()
    world = World(server, attempts=1, breaker={"failures": 10**9})
    server.raises["a"] = Unavailable("reset by peer")

    async def scenario():
        await world.serves()
        loop = asyncio.get_running_loop()
        begun, polls = loop.time(), server.num_polls
        for _ in range(100):
            with pytest.raises(EnvironmentUnavailable):
                await world.score("a")
        assert server.num_polls - polls <= (loop.time() - begun) / SUSPECT_PAUSE_S + 1

    world.play(scenario)


def test_a_call_that_failed_otherwise_is_not_tried_again():
    server = FakeServer()
    world = World(server)
    server.raises["a"] = InternalError("boom")

    async def scenario():
        await world.serves()
        with pytest.raises(EnvironmentFailed):
            await world.score("a")
        assert server.begun == ["a"]

    world.play(scenario)


def test_a_call_that_finds_a_replica_full_waits_for_its_room_before_all_others():
    server = FakeServer()
    world = World(server)
    server.raises["a"] = Overloaded("one at a time")
    for who in "ab":
        server.release(who)

    async def scenario():
        await world.serves()
        first = world.score("a")
        await settled()
        second = world.score("b")
        await settled()
        assert (server.begun, world.status.num_waiting) == (["a"], 2)
        del server.raises["a"]
        await asyncio.gather(first, second)
        assert server.begun == ["a", "a", "b"]

    world.play(scenario)


def test_a_call_that_finds_a_replica_full_goes_before_those_that_waited_meanwhile():
    server = FakeServer()
    world = World(server, max_concurrent=1)
    server.fails["a"] = Overloaded("one at a time")

    async def scenario():
        await world.serves()
        calls = []
        for who in "abc":
            calls.append(world.score(who))
            await settled()
        server.release("a")
        await settled()
        assert server.scoring == []
        del server.fails["a"]
        for who in "bc":
            server.release(who)
        await asyncio.gather(*calls)
        assert server.begun == list("aabc")

    world.play(scenario)


def test_a_call_that_every_replica_is_too_full_for_is_overloaded_in_the_end():
    first, second = FakeServer(), FakeServer()
    world = World(first, second, patience_s=5)
    first.raises["a"] = second.raises["a"] = Overloaded("one at a time")

    async def scenario():
        await world.serves(2)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        with pytest.raises(Overloaded, match="one at a time"):
            await world.score("a")
        assert 5 <= loop.time() - begun <= 7
        assert 4 <= len(first.begun) + len(second.begun) <= 14
        assert world.status.serving

    world.play(scenario)


# --- the breaker ----------------------------------------------------------------------------------


def test_a_replica_that_fails_call_after_call_is_left_alone_until_one_tries_it():
    server, well = FakeServer(), FakeServer()
    world = World(server, well, breaker={"failures": 3, "open_s": 5})
    server.raises["a"] = InternalError("boom")
    for who in "ab":
        well.release(who)

    async def scenario():
        await world.serves(2)
        results = await asyncio.gather(
            *(world.score("a") for _ in range(20)), return_exceptions=True
        )
        assert sum(isinstance(result, EnvironmentFailed) for result in results) >= 3
        assert world.status.num_serving == 1
        assert "3 calls in a row failed there, the last: environment 'game'" in world.status.problem
        num_begun = len(server.begun)
        for _ in range(10):
            await world.score("a")
        assert len(server.begun) == num_begun
        await asyncio.sleep(6)
        assert world.status.num_serving == 2
        trial = world.score("b")
        others = [world.score("b") for _ in range(4)]
        await settled()
        assert server.scoring == ["b"]
        assert world.status.num_serving == 1
        server.release("b")
        await asyncio.gather(trial, *others)
        assert world.status == chat.EnvironmentStatus(
            "game", serving=True, num_replicas=2, num_serving=2
        )

    world.play(scenario)


def test_while_the_only_replica_is_left_alone_calls_wait_and_then_fail_with_the_reason():
    server = FakeServer()
    world = World(server, breaker={"failures": 1, "open_s": 60}, patience_s=5)
    server.raises["a"] = InternalError("boom")

    async def scenario():
        await world.serves()
        with pytest.raises(EnvironmentFailed):
            await world.score("a")
        with pytest.raises(EnvironmentUnavailable, match="1 call failed there"):
            await world.score("b")
        assert server.begun == ["a"]

    world.play(scenario)


def test_reading_says_nothing_of_how_a_replica_works():
    server = FakeServer()
    world = World(server, breaker={"failures": 3, "open_s": 60})
    server.raises["a"] = InternalError("boom")

    async def scenario():
        await world.serves()
        for _ in range(3):
            assert world.status.serving
            with pytest.raises(EnvironmentFailed):
                await world.score("a")
            if world.status.serving:
                await world.environment.get_task("t0")
        assert not world.status.serving

    world.play(scenario)


@pytest.mark.parametrize(
    ("events", "opens"),
    [
        ("ffw" * 5, False),
        ("fff", True),
        ("faff", True),
        ("ffaaaa", False),
    ],
)
def test_only_failures_in_a_row_open_a_breaker(events, opens):
    breaker = Breaker(BreakerConfig(failures=3, open_s=5))
    for event in events:
        trial = breaker.begin()
        match event:
            case "f":
                breaker.failed("boom", 0.0, trial=trial)
            case "w":
                breaker.went_well()
            case "a":
                breaker.abandoned(trial=trial)
    assert breaker.allows(0.0) is not opens
    assert bool(breaker.problem) is opens
    assert breaker.allows(5.0)


def test_a_breaker_that_is_tried_in_vain_is_open_for_as_long_again_and_lets_one_try_at_a_time():
    breaker = Breaker(BreakerConfig(failures=1, open_s=5))
    breaker.failed("boom", 0.0, trial=breaker.begin())
    trial = breaker.begin()
    assert trial
    assert not breaker.allows(6.0)
    breaker.failed("of before", 6.0, trial=False)
    assert not breaker.allows(6.0)
    breaker.failed("boom", 6.0, trial=True)
    assert not breaker.allows(10.9)
    assert breaker.allows(11.0)
    breaker.abandoned(trial=breaker.begin())
    assert breaker.allows(11.0)


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "My_Game"}, "name"),
        ({"addresses": []}, "addresses"),
        ({"addresses": ["game"]}, "addresses[0]: 'game' is not host:port"),
        ({"addresses": ["a:1", "a:1"]}, "addresses: one is there twice"),
        ({"max_concurent": 3}, "did you mean 'max_concurrent'?"),
        ({"answer_timeout_s": 0}, "answer_timeout_s"),
        ({"tls": {"key_file": "k"}}, "certificate_file and key_file go together"),
    ],
)
def test_a_mistake_in_the_configuration_is_named(changes, said):
    with pytest.raises(InvalidRequest) as raised:
        EnvironmentConfig.parse({"name": "game", "addresses": ["a:1"], **changes}, source="test")
    assert said in str(raised.value)
