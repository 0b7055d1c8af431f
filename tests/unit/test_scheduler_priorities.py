"""Classes of priority go before fairness, and take places at the border of a chunk."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.coordinator.scheduler import ProjectPolicy, preemption
from tests.fakes.scheduling import World, weighted


def test_all_of_a_higher_class_go_before_all_of_a_lower_one():
    world = World(bound=1, projects=weighted(a=1.0, b=100.0))
    ids = {}
    for priority in (-1, 0, 1):
        for project in "ab":
            for _ in range(2):
                request = world.submit(project, priority=priority, length=1)
                ids[request.id] = priority
    while world.scheduler.num_queued:
        world.tick()
    assert [ids[number] for number in world.address] == [1] * 4 + [0] * 4 + [-1] * 4


def test_a_class_that_its_quarantine_holds_back_leaves_the_place_to_the_next():
    world = World(bound=1)
    low = world.submit(priority=-1)
    world.submit(model="elsewhere", priority=1)
    assert world.assign() == [low]


@pytest.mark.parametrize(
    ("running", "waiting", "stopped"),
    [
        pytest.param([(0, 1), (0, 1)], [(1, 1)], [1], id="the newest"),
        pytest.param([(-1, 1), (0, 1)], [(1, 1)], [0], id="the lowest class first"),
        pytest.param([(1, 1), (1, 1)], [(1, 1)], [], id="nobody of its own class"),
        pytest.param([(1, 1), (1, 1)], [(0, 1)], [], id="nobody of a higher class"),
        pytest.param([(0, 1), (0, 1)], [(1, 5)], [1], id="one place is enough for a large one"),
        pytest.param([(0, 1), (0, 1)], [(1, 1), (1, 1)], [0, 1], id="a place for each"),
        pytest.param([(0, 1), (0, 1)], [(1, 1)] * 5, [0, 1], id="no more than there are"),
        pytest.param([(0, 1), (0, 4)], [(1, 1)], [1], id="over the bound: the large one"),
        pytest.param([(0, 1), (-1, 4)], [(0, 1), (1, 1)], [1], id="one makes room for two"),
        pytest.param([(-1, 1), (0, 4)], [(1, 1)], [1], id="spared, as without it there is room"),
    ],
)
def test_who_is_stopped(running, waiting, stopped):
    """Requests of a class and a number of completions, on one sampler that takes two."""
    world = World(bound=2)
    requests = []
    for priority, completions in running:
        world.now += 1
        requests.append(world.submit(priority=priority, completions=completions, length=100))
        world.assign()
    for priority, completions in waiting:
        world.submit(priority=priority, completions=completions)
    world.assign()
    named = world.named()
    assert [requests.index(request) for request in named] == stopped
    assert world.named() == [], "asked again before they stopped"


def test_a_preempted_request_goes_on_first_of_its_project_when_the_higher_class_is_done():
    world = World(bound=1)
    low = world.submit("a", priority=-1, length=10)
    world.tick()
    later = world.submit("a", priority=-1, length=10)
    high = world.submit("b", priority=1, length=2)
    (victim,) = world.named()
    assert victim is low
    rest = world.stop(victim)
    while world.scheduler.num_queued or world.left:
        world.tick()
    assert list(world.address) == [low.id, high.id, rest.id, later.id]
    actions = [decision.action for decision in world.scheduler.explain("a", "", 0).decisions]
    assert actions == ["ASSIGNED", "ASSIGNED", "PREEMPTED", "ASSIGNED"]


@pytest.mark.parametrize("why", ["over its quota", "nobody may be stopped"])
def test_nobody_is_sought_to_stop_for_who_cannot_go(why, monkeypatch):
    plans = []
    make = preemption._Preemption
    monkeypatch.setattr(preemption, "_Preemption", lambda *args: plans.append(args) or make(*args))
    used_up = why == "over its quota"
    policy = ProjectPolicy(tokens_per_day=1 if used_up else None)
    world = World(bound=2, projects={"p": policy})
    world.scheduler.used_today("p", world.now)
    world.scheduler.restore_usage("p", int(world.now // 86400), 5)
    for _ in range(20):
        world.submit("q", length=3, preemptible=used_up)
    world.tick()
    high = world.submit("p", priority=1, length=3)
    if used_up:
        for _ in range(15):
            world.tick()
            assert world.named() == []
        assert high.id in world.waiting
    assert world.named() == []
    assert not plans


def test_a_plan_is_made_again_only_after_something_changed(monkeypatch):
    plans = []
    make = preemption._Preemption
    monkeypatch.setattr(preemption, "_Preemption", lambda *args: plans.append(args) or make(*args))
    world = World(bound=2)
    for _ in range(2):
        world.submit(priority=-1, length=100)
    world.tick()
    world.submit(priority=1)
    world.assign()
    assert len(world.named()) == 1
    for _ in range(3):
        world.assign()
        assert world.named() == []
    assert len(plans) == 1


def test_a_sampler_that_a_job_refuses_makes_no_place_for_it():
    world = World(bound=1, samplers=2)
    for _ in range(2):
        world.submit(priority=-1, length=100)
    world.tick()
    here, there = world.samplers
    world.samplers = [here, type(there)("s1", "tiny", (), refused_by=frozenset({"picky"}))]
    for _ in range(3):
        world.submit(priority=1, job="picky")
    assert [world.address[request.id] for request in world.named()] == ["s0"]
    world.submit(priority=1)
    assert [world.address[request.id] for request in world.named()] == ["s1"]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 100_000), samplers=st.integers(1, 3), bound=st.integers(1, 5))
def test_preempt_names_no_more_than_needed_and_whoever_is_named_makes_room(seed, samplers, bound):
    rng = random.Random(seed)
    world = World(samplers=samplers, bound=bound)
    # Nothing is charged in advance: what is given back for a victim would change the order.
    for _ in range(rng.randint(1, 4)):
        for _ in range(rng.randint(1, 8)):
            world.submit(
                rng.choice("abc"),
                priority=rng.choice([-1, 0]),
                completions=rng.randint(1, 4),
                length=100,
                max_tokens=0,
            )
        world.tick()
    for _ in range(rng.randint(1, 6)):
        world.submit(
            rng.choice("abc"),
            priority=rng.choice([0, 1]),
            completions=rng.randint(1, 4),
            max_tokens=0,
        )
    world.assign()
    high = {request.id for request in world.waiting.values()}
    before = {s.address: world.running(s.address) for s in world.samplers}
    named = world.named()
    assert world.named() == []
    stopped = Counter()
    for victim in named:
        stopped[world.address[victim.id]] += len(world.left[victim])
    classes = {victim.id: victim.priority for victim in named}
    sizes = {victim: len(world.left[victim]) for victim in named}
    for victim in named:
        world.stop(victim)
    started = world.assign()
    won = [request for request in started if request.id in high]
    assert bool(won) == bool(named)
    if named:
        assert max(request.priority for request in won) > min(classes.values())
    # Had it kept its place, the last that came there from above it would have had none. (One of a
    # higher class that was stopped there too may have come back before those it was stopped for.)
    for victim, size in sizes.items():
        address = world.address[victim.id]
        if any(o.priority > victim.priority and world.address[o.id] == address for o in named):
            continue
        there = [
            request.num_completions
            for request in started
            if world.address[request.id] == address and request.priority > victim.priority
        ]
        left = before[address] - stopped[address] + size
        assert not there or left + sum(there[:-1]) >= bound


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_no_request_of_a_higher_class_waits_while_one_of_a_lower_has_its_place(seed):
    rng = random.Random(seed)
    world = World(samplers=rng.randint(1, 3), bound=rng.randint(1, 4))
    for _ in range(40):
        for _ in range(rng.randint(0, 2)):
            world.submit(
                rng.choice("abc"),
                priority=rng.choice([-1, 0, 1]),
                completions=rng.randint(1, 3),
                length=rng.randint(1, 9),
            )
        world.assign()
        while victims := world.named():
            for victim in victims:
                world.stop(victim)
            world.assign()
        if world.waiting:
            highest = max(request.priority for request in world.waiting.values())
            for sampler in world.samplers:
                there = [r for r in world.left if world.address[r.id] == sampler.address]
                kept = sum(len(world.left[r]) for r in there if r.priority >= highest)
                assert kept >= world.bound, "stopping all others would make no place"
        world.decode()
