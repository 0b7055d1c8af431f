"""Which replicas of an environment take work, and how soon that is known: in virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from rollmesh import chat
from rollmesh.errors import (
    CapacityExhausted,
    EnvironmentFailed,
    EnvironmentUnavailable,
    Overloaded,
)
from services.reward.environments.failures import told
from tests.fakes.replicas import INFO, FakeServer, World, settled

NOTICED_S = 1.5
"""What the coordinator, which polls in its turn, leaves of the two seconds."""


@pytest.mark.parametrize(
    ("tells_health", "state", "problem"),
    [
        (True, "silent", "10.0.0.1:7: no answer within 1 s"),
        (True, "gone", "10.0.0.1:7: connection refused"),
        (True, "draining", "10.0.0.1:7: it says NOT_SERVING"),
        (False, "silent", "10.0.0.1:7: no answer within 1 s"),
        (False, "gone", "10.0.0.1:7: connection refused"),
    ],
)
def test_a_replica_that_stalls_dies_or_drains_is_out_in_time_and_back_at_once(
    tells_health, state, problem
):
    server = FakeServer(tells_health=tells_health)
    world = World(server)

    async def scenario():
        assert not world.status.serving
        assert world.status.problem == "10.0.0.1:7: not looked up yet"
        await world.serves()
        assert world.status == chat.EnvironmentStatus("game", serving=True, num_serving=1)
        await asyncio.sleep(10.17)
        assert world.status.serving
        server.state = state
        assert await world.serves(0) <= NOTICED_S
        assert world.status == chat.EnvironmentStatus("game", serving=False, problem=problem)
        await asyncio.sleep(10)
        assert not world.status.serving
        server.state = "serving"
        assert await world.serves() <= 1.3 if state == "silent" else 0.4

    world.play(scenario)


def test_a_loop_that_was_busy_itself_takes_no_replica_for_stalled():
    world = World(FakeServer())

    async def scenario():
        await world.serves()
        for _ in range(5):
            asyncio.get_running_loop().busy(3.0)
            await settled()
            assert world.status.serving

    world.play(scenario)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": "gane"}, "the server has no environment 'game'; it has 'gane'"),
        ({"version": ""}, "Describe: version is empty"),
        (
            {"has_score": False, "has_episodes": False},
            "Describe: neither has_score nor has_episodes is set",
        ),
        ({"observation_kinds": ()}, "Describe: observation_kinds has none that is known here"),
        ({"splits": ()}, "Describe: splits is empty"),
        (
            {"splits": (chat.Split("Train"),)},
            "Describe: a split's name is not 1–63 of a-z, 0-9 and '-'",
        ),
        ({"limits": chat.Limits(max_turns=-1)}, "Describe: a limit is negative"),
    ],
)
def test_a_server_that_is_not_what_it_should_be_takes_no_work_and_the_problem_says_why(
    changes, problem
):
    server = FakeServer(**changes)
    world = World(server)

    async def scenario():
        await world.until(lambda: problem in world.status.problem)
        assert world.status.problem == f"10.0.0.1:7: {problem}"
        assert world.environment.describe() is None
        server.info = INFO
        await world.serves()

    world.play(scenario)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": "2"}, "it serves version '2', the others '1'"),
        ({"has_score": False}, "it has the others' version and differs in has_score"),
        (
            {"tools": (chat.Tool("t"),), "deterministic": True},
            "it has the others' version and differs in tools, deterministic",
        ),
        (
            {"limits": chat.Limits(max_turns=3)},
            "it has the others' version and differs in limits",
        ),
    ],
)
def test_a_replica_that_is_unlike_the_others_takes_no_work_until_none_of_them_is_left(
    changes, problem
):
    first, second = FakeServer(), FakeServer(**changes)
    world = World(first, second)

    async def scenario():
        await world.until(lambda: bool(world.status.problem.endswith(problem)))
        assert world.status.num_serving == 1
        assert world.environment.describe().version == "1"
        first.state = "gone"
        await world.until(lambda: "10.0.0.1:7: connection refused" in world.status.problem)
        assert world.status.num_serving == 1
        described = world.environment.describe()
        assert replace(described, limits=second.info.limits) == second.info
        first.state = "serving"
        await world.until(lambda: "10.0.0.1:7: it" in world.status.problem)
        assert world.status.num_serving == 1
        first.info = second.info
        await world.serves(2)

    world.play(scenario)


def test_replicas_may_take_different_numbers_of_episodes_and_say_it_in_other_words():
    first = FakeServer(limits=chat.Limits(max_concurrent_episodes=3))
    second = FakeServer(limits=chat.Limits(max_concurrent_episodes=9), description="other words")
    world = World(first, second, max_concurrent=5)

    async def scenario():
        await world.serves(2)
        assert world.environment.describe().limits.max_concurrent_episodes == 3 + 5

    world.play(scenario)


def test_a_server_that_was_exchanged_unnoticed_is_noticed():
    server = FakeServer()
    world = World(server)

    async def scenario():
        await world.serves()
        server.info = replace(INFO, version="2")
        await world.until(lambda: world.environment.describe().version == "2")

    world.play(scenario)


# --- names ----------------------------------------------------------------------------------------


def test_each_place_that_a_name_leads_to_is_a_replica_for_as_long_as_it_does():
    servers = FakeServer(), FakeServer(), FakeServer()
    one, two, three = (f"10.0.0.{number}:7" for number in (1, 2, 3))
    world = World(*servers, names={"game.svc:7": [one, two], "dns:///spare:7": []})
    world.names["spare:7"] = []

    async def scenario():
        await world.serves(2)
        assert world.status.num_replicas == 3
        assert world.status.problem == "spare:7: the name leads nowhere"
        world.names["spare:7"] = [three]
        await world.serves(3)
        assert world.status.problem == ""
        world.names["game.svc:7"] = [two]
        await world.serves(2)
        await world.until(lambda: servers[0].closed)
        assert world.status.num_replicas == 2
        polls = servers[0].num_polls
        await asyncio.sleep(10)
        assert servers[0].num_polls == polls

    world.play(scenario)


def test_a_replica_that_its_name_does_not_lead_to_any_more_ends_what_it_has_begun():
    first, second = FakeServer(), FakeServer()
    one, two = "10.0.0.1:7", "10.0.0.2:7"
    world = World(first, second, names={"game.svc:7": [one]})

    async def scenario():
        await world.serves()
        begun = world.score("a")
        await world.until(lambda: first.scoring == ["a"])
        world.names["game.svc:7"] = [two]
        await world.until(lambda: second.num_polls > 3)
        assert world.status.num_replicas == 1
        later = [world.score(who) for who in "bcd"]
        await world.until(lambda: sorted(second.scoring) == ["b", "c", "d"])
        await asyncio.sleep(10)
        assert not first.closed
        first.release("a")
        await begun
        await world.until(lambda: first.closed)
        for who in "bcd":
            second.release(who)
        await asyncio.gather(*later)

    world.play(scenario)


def test_when_a_name_server_is_away_what_it_said_last_holds():
    server = FakeServer()
    world = World(server, names={"game.svc:7": ["10.0.0.1:7"]})

    async def scenario():
        await world.serves()
        world.names["game.svc:7"] = []
        await asyncio.sleep(60)
        assert world.status == chat.EnvironmentStatus("game", serving=True, num_serving=1)

    world.play(scenario)


def test_of_many_problems_a_few_are_told():
    world = World(*(FakeServer(version="") for _ in range(6)))

    async def scenario():
        await world.until(lambda: world.status.problem.count("version is empty") == 3)
        assert world.status.problem.endswith("; and 3 more")

    world.play(scenario)


def test_of_a_long_problem_the_beginning_is_told():
    world = World(FakeServer(name="g" * 63), remote_name="a" * 1000)

    async def scenario():
        await world.until(lambda: "has no environment" in world.status.problem)
        assert len(world.status.problem) < 400

    world.play(scenario)


# --- what runs there, and what waits --------------------------------------------------------------


def test_what_runs_at_a_replica_that_stalls_is_given_up_after_its_patience():
    server = FakeServer()
    world = World(server, patience_s=5)

    async def scenario():
        await world.serves()
        running = world.score("a")
        await world.until(lambda: server.scoring == ["a"])
        server.state = "silent"
        await world.serves(0)
        await asyncio.sleep(3)
        assert not running.done()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        with pytest.raises(EnvironmentUnavailable, match="7: no answer within 1 s"):
            await running
        assert loop.time() - begun <= 3
        assert server.scoring == []

    world.play(scenario)


def test_a_replica_that_answers_calls_has_not_stalled_whatever_its_health_does():
    server = FakeServer()
    world = World(server, patience_s=1)

    async def scenario():
        await world.serves()
        loop = asyncio.get_running_loop()
        server.health_state = "silent"
        until = loop.time() + 20
        while loop.time() < until:
            server.release("a")
            assert len(await world.score("a")) == 1
            assert world.status.serving
            await asyncio.sleep(0.5)
        assert await world.serves(0) <= NOTICED_S

    world.play(scenario)


def test_an_answer_that_a_busy_loop_has_not_come_to_is_one():
    server = FakeServer()
    world = World(server)

    async def scenario():
        await world.serves()
        server.health_state = "silent"
        for _ in range(20):
            await asyncio.sleep(0.9)
            server.num_answers += 1
            assert world.status.serving
        assert await world.serves(0) <= NOTICED_S

    world.play(scenario)


def test_a_replica_that_seemed_stalled_is_back_when_a_call_is_answered():
    server = FakeServer()
    world = World(server, patience_s=60)

    async def scenario():
        await world.serves()
        running = world.score("a")
        await world.until(lambda: server.scoring == ["a"])
        server.health_state = "silent"
        await world.serves(0)
        await asyncio.sleep(10)
        assert not world.status.serving
        server.release("a")
        await running
        assert world.status.serving

    world.play(scenario)


@pytest.mark.parametrize("state", ["silent", "draining"])
def test_what_runs_at_a_replica_goes_on_while_it_stalls_for_a_moment_or_drains(state):
    server = FakeServer()
    world = World(server, patience_s=5)

    async def scenario():
        await world.serves()
        running = world.score("a")
        await world.until(lambda: server.scoring == ["a"])
        server.state = state
        await asyncio.sleep(4 if state == "silent" else 30)
        assert not world.status.serving
        server.state = "serving"
        await world.serves()
        await asyncio.sleep(10)
        server.release("a")
        assert len(await running) == 1

    world.play(scenario)


def test_a_call_waits_for_a_replica_that_is_back_in_time_and_else_fails_with_the_reason():
    server = FakeServer()
    world = World(server, patience_s=5)
    server.release("a")

    async def scenario():
        await world.serves()
        server.state = "gone"
        await world.serves(0)
        waiting = world.score("a")
        await asyncio.sleep(3)
        assert world.status.num_waiting == 1
        server.state = "serving"
        assert len(await waiting) == 1
        server.state = "gone"
        await world.serves(0)
        waiting = world.score("a")
        loop = asyncio.get_running_loop()
        begun = loop.time()
        with pytest.raises(EnvironmentUnavailable, match="7: connection refused"):
            await waiting
        assert loop.time() - begun == pytest.approx(5, abs=0.1)
        begun = loop.time()
        with pytest.raises(EnvironmentUnavailable):
            await world.score("a")
        assert loop.time() == begun
        assert world.status.num_waiting == 0

    world.play(scenario)


def test_a_call_in_the_first_moment_waits_for_the_first_poll():
    server = FakeServer()
    world = World(server)
    server.release("a")

    async def scenario():
        assert len(await world.score("a")) == 1

    world.play(scenario)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("SERVER: Received message larger than max (5134232 vs. 4194304)", EnvironmentFailed),
        ("CLIENT: Sent message larger than max (5134232 vs. 4194304)", EnvironmentFailed),
        ("grpc: received message larger than max (5134232 vs. 4194304)", EnvironmentFailed),
        ("gRPC message exceeds maximum size 4194304: 5134232", EnvironmentFailed),
        ("Received message exceeds the maximum configured message size.", EnvironmentFailed),
        ("128 episodes are under way", Overloaded),
        ("episodes exceed the maximum", Overloaded),
    ],
)
def test_a_message_that_is_too_large_is_no_overload(message, kind):
    error = CapacityExhausted(f"RESOURCE_EXHAUSTED: {message}")
    found = told(error, environment="game", place="127.0.0.1:1", refusals=())
    assert type(found) is kind
    assert bool(found.retry_after_s) is (kind is Overloaded)
