"""Shares by weight, whatever the requests are like; no credit is hoarded and nobody starves."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.coordinator.scheduler import ProjectPolicy
from services.coordinator.scheduler.fairness import MAX_IDLE_ACCOUNTS
from tests.fakes.scheduling import World, weighted


def share_of(world, project):
    shares = world.scheduler.explain(project, "", world.now).shares
    return shares[0] if shares else None


@pytest.mark.parametrize("samplers", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_tokens_are_shared_as_the_weights_say_whatever_the_shape_of_the_requests(samplers, seed):
    rng = random.Random(seed)
    price = rng.choice([0.0, 0.25, 1.0, 3.0])
    world = World(samplers=samplers, projects=weighted(a=1.0, b=2.0, c=4.0), price=price)
    shapes = {
        project: {
            "length": rng.choice([3, 10, 40]),
            "completions": rng.choice([1, 2, 4]),
            "prompt": rng.choice([1, 20]),
        }
        for project in "abc"
    }
    submitted = Counter()
    for _ in range(3000):
        # Everybody always has something waiting, more than all places together.
        while shortest := [p for p in "abc" if submitted[p] - world.assigned[p] < 30]:
            world.submit(shortest[0], **shapes[shortest[0]])
            submitted[shortest[0]] += 1
        world.tick()
    total = sum(world.tokens.values())
    shares = {project: tokens / total for project, tokens in world.tokens.items()}
    assert shares == pytest.approx({"a": 1 / 7, "b": 2 / 7, "c": 4 / 7}, rel=0.05)


def test_a_prompt_counts_its_price():
    world = World(bound=2, price=0.25)
    for _ in range(200):
        world.submit("long", prompt=400, length=1)
        world.submit("short", prompt=0, length=101)
    while world.order.count("short") < 50:
        world.tick()
    assert world.order.count("long") == pytest.approx(50, abs=2)


def test_a_flood_delays_a_newcomer_by_one_turn_at_most():
    world = World()
    for _ in range(1000):
        world.submit("flood", completions=4)
    for _ in range(50):
        world.tick()
    before = len(world.order)
    world.submit("light")
    while "light" not in world.order:
        world.tick()
    assert world.order[before:].index("light") <= 1


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.25, 1.0, 2.0, 8.0]), min_size=2, max_size=5),
    ahead=st.integers(0, 4),
    seed=st.integers(0, 10_000),
)
def test_nobody_waits_longer_than_the_weights_say(weights, ahead, seed):
    """Requests of one size: for each turn of its own, the weight of each other one over its own."""
    rng = random.Random(seed)
    projects = {f"p{n}": ProjectPolicy(weight=weight) for n, weight in enumerate(weights)}
    world = World(bound=1, projects=projects, price=1.0)
    others = list(projects)[1:]
    for _ in range(40):
        world.submit(rng.choice(others))
        world.tick()
    for other in others:
        for _ in range(200):
            world.submit(other)
    world.tick()
    for _ in range(ahead):
        world.submit("p0")
    last = world.submit("p0")
    before = len(world.order)
    while last.id in world.waiting:
        world.tick()
    turns = Counter(world.order[before:])
    for other in others:
        ratio = projects[other].weight / projects["p0"].weight
        # One more at each end: who was next, and what is in flight.
        assert turns[other] <= math.ceil((ahead + 1) * ratio) + 2


def test_a_newcomer_of_which_no_completion_has_ended_gets_no_more_than_its_share():
    world = World(bound=64)
    world.submit("q", length=64)
    while world.waiting or world.left:
        world.tick()
    for _ in range(100):
        world.submit("q", max_tokens=1000)
        world.submit("new", max_tokens=1000)
    world.order.clear()
    world.assign()
    assert Counter(world.order) == {"q": 32, "new": 32}


def test_an_idle_project_hoards_no_credit():
    world = World()
    world.submit("rests")
    for _ in range(200):
        world.submit("works")
        world.tick()
    for _ in range(100):
        world.submit("rests")
        world.submit("works")
    world.order.clear()
    for _ in range(60):
        world.tick()
    shares = Counter(world.order)
    assert shares["rests"] == pytest.approx(shares["works"], abs=4)


def test_a_newcomer_to_an_empty_class_starts_level_with_who_was_served_in_another():
    world = World(bound=1)
    for _ in range(50):
        world.submit("old", length=20)
    while world.order.count("old") < 50 or world.left:
        world.tick()
    for _ in range(20):
        world.submit("new", length=20, priority=1)
        world.submit("old", length=20, priority=1)
    world.order.clear()
    while len(world.order) < 20:
        world.tick()
    assert world.order.count("old") == pytest.approx(10, abs=1)


def test_what_was_served_in_a_higher_class_counts_in_a_lower_one():
    world = World(bound=1)
    for project in ("greedy", "meek"):
        for _ in range(40):
            world.submit(project, length=10)
    for _ in range(10):
        world.submit("greedy", length=10, priority=1)
    world.order.clear()
    while len(world.order) < 30:
        world.tick()
    assert world.order[:10] == ["greedy"] * 10
    assert world.order[10:].count("meek") >= 14, "it catches up"


def test_what_a_quota_of_its_own_holds_back_is_not_owed_to_a_project():
    world = World(bound=4, projects={"capped": ProjectPolicy(max_tokens_in_flight=30)})
    for _ in range(100):
        world.submit("capped", prompt=10, length=20, max_tokens=20)
        world.submit("other", prompt=10, length=20, max_tokens=20)
    while len(world.order) < 60:
        world.tick()
    capped = share_of(world, "capped").virtual_tokens
    assert capped < share_of(world, "other").virtual_tokens / 2
    newcomer = [world.submit("newcomer", prompt=10, length=20, max_tokens=20) for _ in range(50)]
    world.order.clear()
    while len(world.order) < 30:
        world.tick()
    shares = Counter(world.order)
    assert shares["other"] == pytest.approx(shares["newcomer"], abs=3)
    assert newcomer[-1].id in world.waiting


def test_what_was_not_begun_for_a_days_quota_is_not_owed_the_next_day():
    world = World(bound=1, projects={"capped": ProjectPolicy(tokens_per_day=200)})
    for _ in range(200):
        world.submit("capped", prompt=0, length=10)
        world.submit("other", prompt=0, length=10)
    while world.order.count("other") < 100:
        world.tick()
    assert world.order.count("capped") == pytest.approx(20, abs=1)
    world.now += 86400
    world.order.clear()
    while len(world.order) < 20:
        world.tick()
    assert world.order.count("capped") == pytest.approx(10, abs=1)


def test_a_request_that_was_cut_off_pays_for_what_it_got_and_no_more():
    world = World(bound=1)
    for project in "ab":
        world.submit(project, length=50)
    while world.left or world.scheduler.num_queued:
        world.tick()
    for _ in range(300):
        world.submit("a", length=50)
        world.submit("b", length=50)
    while len(world.order) < 100:
        world.tick()
        world.tick()
        for request in [request for request in world.left if request.project == "a"]:
            world.finish(request, completed=False)
    tokens = world.tokens
    assert tokens["a"] == pytest.approx(tokens["b"], rel=0.1)
    assert Counter(world.order)["a"] > 80


def test_a_prompt_is_paid_once_however_often_its_request_moves():
    world = World(bound=1)
    request = world.submit("a", prompt=1000, length=10)
    for _ in range(3):
        world.tick()
        (request,) = world.left
        request = world.stop(request)
    while world.left or world.scheduler.num_queued:
        world.tick()
    assert share_of(world, "a").virtual_tokens == 1000 + 10
    assert world.scheduler.used_today("a", world.now) == 1000 + 10


def test_a_share_says_how_a_project_stands():
    world = World(bound=2, projects=weighted(a=1.0, b=3.0, idle=4.0))
    world.submit("idle", length=1)
    world.tick()
    for project in "aabbb":
        world.submit(project, prompt=6, length=4)
    world.tick()
    share = share_of(world, "b")
    assert (share.base_model, share.weight) == ("tiny", 3.0)
    assert share.num_queued + share.num_running == 3
    assert share.entitled == 3 / 4
    assert share.virtual_tokens > 0
    assert share_of(world, "idle").entitled == 0
    assert share_of(world, "stranger") is None


def test_accounts_of_projects_that_asked_longest_ago_are_forgotten():
    world = World()
    world.submit("busy", length=10**6)

    def ask(project):
        world.submit(project, length=1)
        world.tick()

    for number in range(MAX_IDLE_ACCOUNTS):
        ask(f"p{number}")
    ask("p0")
    assert share_of(world, "p1") is not None
    ask("one more")
    assert share_of(world, "p1") is None
    assert share_of(world, "p0") is not None, "it asked again since"
    assert share_of(world, "busy").num_running == 1


def test_whoever_a_quarantine_holds_back_for_a_while_keeps_its_turn():
    world = World(samplers=2, bound=1)
    here, there = world.samplers
    world.samplers = [replace(here, refused_by=frozenset({"picky"})), there]
    for _ in range(30):
        world.submit("p", job="picky", length=10)
        world.submit("q", length=10)
    while len(world.order) < 30:
        world.tick()
    assert world.order.count("p") == pytest.approx(15, abs=1), "all of the one that it may ask"
