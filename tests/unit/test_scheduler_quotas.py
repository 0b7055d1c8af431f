"""Tokens in flight and tokens a day: never exceeded, waited for by jobs, refused to callers."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollmesh.errors import Overloaded, QuotaExceeded
from services.coordinator.scheduler import ProjectPolicy
from tests.fakes.scheduling import NOON, SamplerState, World

DAY_S = 86400
TODAY = int(NOON // DAY_S)


def in_flight(world, project="p"):
    (used,) = (
        quota.used
        for quota in world.scheduler.explain(project, "", world.now).quotas
        if quota.name == "tokens_in_flight"
    )
    return used


def capped(tokens=None, *, per_day=None, **options):
    policy = ProjectPolicy(max_tokens_in_flight=tokens, tokens_per_day=per_day)
    return World(projects={"p": policy}, **options)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_tokens_in_flight_are_never_over_the_quota_and_everything_is_served(seed):
    rng = random.Random(seed)
    world = capped(100, samplers=2, bound=6)
    world.samplers.append(SamplerState("big", "big", ()))
    for _ in range(40):
        for _ in range(rng.randint(0, 2)):
            length = rng.randint(1, 12)
            world.submit(
                rng.choice("ppq"),
                model=rng.choice(["tiny", "big"]),
                prompt=rng.randint(0, 40),
                completions=rng.randint(1, 4),
                length=length,
                max_tokens=rng.randint(length, 40),
                priority=rng.choice([-1, 0, 1]),
            )
        world.assign()
        for victim in world.named():
            world.stop(victim)
        world.assign()
        running = [request for request in world.left if request.project == "p"]
        counted = sum(
            request.num_prompt_tokens + request.max_tokens * len(world.left[request])
            for request in running
        )
        assert in_flight(world) == counted
        assert counted <= 100 or len(running) == 1, "one that is larger runs alone"
        world.decode()
    for _ in range(5000):
        world.tick()
        if not world.waiting and not world.left:
            break
    assert not world.waiting, "nobody starves"
    assert in_flight(world) == 0


def test_a_large_request_is_not_overtaken_for_ever_by_small_ones_of_its_project():
    world = capped(100)
    world.samplers.append(SamplerState("big", "big", ()))
    world.submit(prompt=0, length=50, max_tokens=50)
    world.tick()
    large = world.submit(prompt=0, length=80, max_tokens=80)
    world.tick()
    for _ in range(200):
        world.submit(prompt=0, length=10, max_tokens=30, model="big")
        world.tick()
        if large.id not in world.waiting:
            break
    assert world.now - NOON < 60
    assert world.assigned["p"] == 2


@pytest.mark.parametrize("model", ["tiny", "big"])
def test_a_request_of_a_higher_class_does_not_wait_for_a_large_one_of_a_lower(model):
    world = capped(100)
    world.samplers.append(SamplerState("big", "big", ()))
    world.submit(prompt=0, length=50, max_tokens=50)
    world.tick()
    large = world.submit(prompt=0, length=80, max_tokens=80)
    world.tick()
    small = world.submit(prompt=0, length=10, max_tokens=10, priority=1, model=model)
    assert world.assign() == [small]
    assert large.id in world.waiting


def test_what_was_resumed_goes_before_the_large_one_that_tokens_are_kept_for():
    world = capped(100)
    begun = world.submit(prompt=0, length=50, max_tokens=50)
    world.tick()
    large = world.submit(prompt=0, length=80, max_tokens=80)
    world.tick()
    rest = world.stop(begun)
    assert world.assign() == [rest]
    world.finish(rest, completed=False)
    assert world.assign() == [large]


def test_nothing_is_kept_for_a_request_that_left_or_that_no_sampler_serves():
    world = capped(100)
    world.samplers.append(SamplerState("big", "big", ()))
    world.submit(prompt=0, length=50, max_tokens=50)
    world.tick()
    for leaves in ("the request", "the sampler"):
        large = world.submit(prompt=0, length=80, max_tokens=80, model="big")
        world.tick()
        small = world.submit(prompt=0, length=10, max_tokens=10)
        world.tick()
        assert small.id in world.waiting
        if leaves == "the request":
            world.withdraw(large)
        else:
            world.samplers.pop()
        world.tick()
        assert small.id not in world.waiting


def test_a_project_at_its_quota_holds_up_no_other():
    world = capped(20, bound=100)
    for _ in range(3):
        world.submit("p", prompt=0, length=20, max_tokens=20)
        world.submit("q", prompt=0, length=20, max_tokens=20)
    world.assign()
    assert sorted(world.order) == ["p", "q", "q", "q"]


def test_completions_that_have_ended_count_no_more():
    world = capped(100)
    first = world.submit(prompt=10, completions=3, length=10, max_tokens=30)
    world.assign()
    assert in_flight(world) == 100
    world.scheduler.progress(first.id, num_tokens=10, num_finished=1)
    assert in_flight(world) == 70
    world.submit(prompt=0, length=30, max_tokens=30)
    assert len(world.assign()) == 1


def test_without_max_tokens_the_length_of_the_projects_completions_counts():
    world = capped(1000)
    world.submit(prompt=0, length=20)
    world.assign()
    assert in_flight(world) == 64
    while world.left:
        world.tick()
    world.submit(prompt=5, length=20, completions=2)
    world.assign()
    assert in_flight(world) == 45


def test_a_caller_over_the_tokens_in_flight_is_refused_with_a_time_to_come_back():
    world = capped(100)
    world.submit(length=30, max_tokens=30, prompt=20, job="")
    while world.left or world.waiting:
        world.tick()
    world.submit(length=30, max_tokens=30, prompt=20, job="")
    world.tick()
    world.tick()
    with pytest.raises(QuotaExceeded) as caught:
        world.submit(max_tokens=30, prompt=21, job="")
    assert caught.value.context == {
        "project": "p",
        "quota": "tokens_in_flight",
        "value": "50",
        "allowed": "100",
        "position": "1",
    }
    assert caught.value.retry_after_s == 28, "the last one took 30 s, and this one had 2"
    world.submit(max_tokens=30, prompt=20, job="")
    assert world.scheduler.explain("p", "", world.now).decisions[0].action == "REFUSED"


def test_what_was_begun_is_not_refused_but_waits():
    world = capped(100, per_day=1000)
    world.submit(length=90, max_tokens=90, prompt=10, job="")
    world.tick()
    begun = world.submit(max_tokens=30, prompt=20, job="", resumed=True, length=5)
    world.tick()
    assert begun.id in world.waiting
    assert world.explain(begun).rule == "PROJECT_TOKENS_IN_FLIGHT"


def test_tokens_of_a_day_are_prompts_and_what_was_drawn():
    world = World()
    world.submit(prompt=7, completions=2, length=10)
    for _ in range(4):
        world.tick()
    assert world.scheduler.used_today("p", world.now) == 7 + 8
    assert world.scheduler.take_usage() == {("p", TODAY): (7, 8)}
    world.tick()
    assert world.scheduler.take_usage() == {("p", TODAY): (0, 2)}
    assert world.scheduler.take_usage() == {}
    assert world.scheduler.used_today("p", world.now) == 17
    assert world.scheduler.used_today("p", world.now + DAY_S) == 0


def test_when_a_days_tokens_are_used_up_what_runs_goes_on_and_nothing_begins_before_midnight():
    world = capped(per_day=30, bound=1)
    world.submit(prompt=10, length=40)
    waits = world.submit(prompt=10, length=40)
    other = world.submit("q", length=100, prompt=0)
    for _ in range(10):
        world.tick()
    (running,) = world.left
    rest = world.stop(running)
    world.scheduler.used_today("p", world.now)
    while world.scheduler.used_today("p", world.now) < 50:
        world.tick()
    assert rest.id in world.address, "what had a place goes on"
    for _ in range(100):
        world.tick()
    assert other.id not in world.waiting
    assert waits.id in world.waiting
    with pytest.raises(QuotaExceeded) as caught:
        world.submit(job="")
    assert caught.value.context["quota"] == "tokens_per_day"
    assert (caught.value.context["value"], caught.value.context["allowed"]) == ("50", "30")
    assert caught.value.context["position"] == "2"
    assert caught.value.retry_after_s == DAY_S - world.now % DAY_S
    world.now = (TODAY + 1) * DAY_S
    world.submit(job="")
    world.assign()
    assert waits.id not in world.waiting


def test_what_was_used_before_a_restart_counts_today_and_only_once():
    world = capped(per_day=100)
    world.scheduler.restore_usage("p", TODAY - 1, 500)
    assert world.scheduler.used_today("p", NOON) == 0
    world.submit(prompt=5, length=10)
    world.tick()
    for _ in range(2):
        world.scheduler.restore_usage("p", TODAY, 60)
        assert world.scheduler.used_today("p", NOON) == 66
    assert world.scheduler.take_usage() == {("p", TODAY): (5, 1)}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_nothing_begins_over_a_days_quota_and_all_that_is_counted_is_told(seed):
    rng = random.Random(seed)
    world = capped(per_day=150)
    told = {}
    for _ in range(60):
        world.submit(rng.choice("pq"), prompt=rng.randint(0, 9), length=rng.randint(1, 9))
        used = world.scheduler.used_today("p", world.now)
        begun = [request.project for request in world.assign()]
        assert used < 150 or "p" not in begun
        world.decode()
        world.now += 1800
        if rng.random() < 0.3:
            for key, tokens in world.scheduler.take_usage().items():
                told[key] = told.get(key, 0) + sum(tokens)
    for key, tokens in world.scheduler.take_usage().items():
        told[key] = told.get(key, 0) + sum(tokens)
    assert sum(told.values()) == sum(world.tokens.values())
    assert len({day for _, day in told}) == 2


def test_what_a_quota_holds_back_goes_on_as_soon_as_it_may():
    """Whatever it is that changes: a completion, a request, the day or the fleet."""
    world = capped(100, per_day=10_000, bound=100)
    world.submit(prompt=0, completions=2, max_tokens=50, length=5)
    first = world.submit(prompt=0, max_tokens=50)
    world.assign()
    assert world.assign() == []
    (running,) = world.left
    world.scheduler.progress(running.id, num_tokens=5, num_finished=1)
    assert world.assign() == [first]
    large = world.submit(prompt=0, max_tokens=60)
    small = world.submit(prompt=0, max_tokens=10)
    assert world.assign() == []
    world.finish(running, completed=False)
    assert world.assign() == []
    world.withdraw(large)
    assert world.assign() == [small]
    last = world.submit(prompt=0, max_tokens=50)
    assert world.assign() == []
    world.finish(first, completed=False)
    assert world.assign() == [last]


def test_what_a_quota_holds_back_may_be_something_else_when_something_comes():
    world = capped(per_day=10, bound=100)
    begun = world.submit(prompt=10, length=50, max_tokens=5)
    world.assign()
    waits = world.submit(prompt=0)
    assert world.assign() == []
    rest = world.stop(begun)
    assert world.assign() == [rest]
    assert world.assign() == []
    world.now += DAY_S
    assert world.assign() == [waits]


def test_an_interactive_request_that_waits_is_refused_when_the_day_is_used_up():
    world = capped(per_day=30, bound=1)
    world.submit(prompt=10, length=25, max_tokens=15)
    world.assign()
    waits = [world.submit(prompt=0, max_tokens=5, job="") for _ in range(2)]
    of_job = world.submit(prompt=0, max_tokens=5)
    rest = world.submit(prompt=0, max_tokens=5, job="", resumed=True)
    other = world.submit("q", job="")
    for _ in range(19):
        world.tick()
    assert world.scheduler.refused(world.now) == []
    world.tick()
    refused = world.scheduler.refused(world.now)
    assert [request for request, _ in refused] == waits
    assert {error.context["quota"] for _, error in refused} == {"tokens_per_day"}
    assert refused[0][1].retry_after_s == DAY_S - world.now % DAY_S
    world.tick()
    assert world.scheduler.refused(world.now) == [], "told once"
    for request in waits:
        world.withdraw(request)
    assert set(world.waiting) == {of_job.id, rest.id, other.id}


def test_a_caller_behind_one_that_a_quota_holds_back_is_refused():
    world = capped(100)
    world.submit(prompt=0, length=60, max_tokens=60)
    world.submit(prompt=0, length=60, max_tokens=60)
    world.tick()
    with pytest.raises(QuotaExceeded) as caught:
        world.submit(prompt=0, max_tokens=10, job="")
    assert caught.value.context["quota"] == "tokens_in_flight"
    world.submit(prompt=0, max_tokens=10, job="", priority=1)


def test_what_is_in_flight_counts_of_the_day_already():
    world = capped(per_day=100, bound=100)
    for _ in range(10):
        world.submit(prompt=10, length=10, max_tokens=40)
    assert len(world.assign()) == 2
    with pytest.raises(QuotaExceeded) as caught:
        world.submit(job="")
    assert (caught.value.context["quota"], caught.value.context["value"]) == (
        "tokens_per_day",
        "100",
    )
    assert caught.value.retry_after_s < 3600, "they may end with fewer"
    most = 0
    for _ in range(100):
        world.tick()
        most = max(most, world.scheduler.used_today("p", world.now))
    assert world.assigned["p"] == 5, "what was not drawn is there for others"
    assert most == 100


def test_a_part_of_a_request_that_has_not_begun_waits_for_the_next_day():
    world = capped(per_day=10, bound=100)
    world.submit(prompt=10, length=5, max_tokens=0)
    world.assign()
    anew = world.submit(prompt=0, max_tokens=5, resumed=True, anew=True)
    begun = world.submit(prompt=0, max_tokens=5, resumed=True)
    of_call = world.submit(prompt=0, max_tokens=5, resumed=True, anew=True, job="", priority=1)
    assert world.assign() == [of_call, begun]
    while world.left:
        world.tick()
    world.now += DAY_S
    assert world.assign() == [anew]


def test_what_a_job_asks_for_and_is_refused_leaves_no_decision():
    world = World(queue=1)
    world.submit()
    for job in ("projects/p/jobs/j", ""):
        with pytest.raises(Overloaded):
            world.submit(job=job)
    (decision,) = world.scheduler.explain("p", "", world.now).decisions
    assert decision.action == "REFUSED"


def test_a_sampler_that_was_heard_of_when_preempting_is_given_what_waits():
    world = capped(100, bound=100)
    world.samplers = [replace(world.samplers[0], refused_by=frozenset({"picky"}))]
    picky = world.submit(job="picky")
    assert world.assign() == []
    world.samplers = [replace(world.samplers[0], refused_by=frozenset())]
    assert world.named() == []
    assert world.assign() == [picky]
