"""What is told of whoever waits: a rule that holds, and without which it is assigned."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from rollmesh.types import Decision
from services.coordinator.scheduler import ProjectPolicy
from services.coordinator.scheduler.explain import MAX_AHEAD, MAX_WAITING
from tests.fakes.scheduling import NOON, SamplerState, World, sampler_of


def blocked():
    """A world whose only sampler has no place for long."""
    world = World(bound=1, projects={"capped": ProjectPolicy(max_tokens_in_flight=50)})
    world.submit("other", length=1000, priority=1, prompt=0)
    world.tick()
    return world


def test_next_of_all_waits_for_room():
    world = blocked()
    since = world.now
    request = world.submit(job="projects/p/jobs/a")
    world.tick()
    waiting = world.explain(request)
    assert waiting.rule == "NO_ROOM"
    assert "each of the 1 samplers of 'tiny'" in waiting.reason
    assert "1 completions under way" in waiting.reason
    assert waiting.release == "the end of completions on one of them"
    assert (waiting.position, waiting.ahead, waiting.since) == (1, (), since)
    assert waiting.job == "projects/p/jobs/a"


def test_who_goes_before_is_counted_and_named_only_of_its_own_project():
    world = blocked()
    own = [world.submit("p") for _ in range(MAX_AHEAD + 3)]
    world.submit("q", priority=1)
    world.submit("r")
    world.tick()
    head, last = world.explain(own[0]), world.explain(own[-1])
    assert (head.rule, head.position, head.ahead) == ("PRIORITY", 2, ())
    assert "1 requests of classes above 'normal'" in head.reason
    nearest = [request.subject for request in reversed(own[:-1])]
    assert list(last.ahead) == nearest[:MAX_AHEAD]
    assert last.position == len(own) + 2
    assert "projects/q" not in str(last)
    assert "projects/r" not in str(last)


def test_whoever_had_more_waits_for_its_fair_share():
    world = blocked()
    heavy = world.submit("other")
    light = [world.submit("light") for _ in range(2)]
    world.tick()
    assert world.explain(light[0]).rule == "NO_ROOM"
    assert world.explain(light[1]).rule == "ORDER"
    waiting = world.explain(heavy)
    assert (waiting.rule, waiting.position) == ("FAIR_SHARE", 2)
    assert waiting.reason.startswith("1 requests of 1 other projects go first")


def test_whoever_cannot_go_is_not_in_anybodys_way():
    world = blocked()
    world.samplers = [replace(world.samplers[0], refused_by=frozenset({"picky"}))]
    picky = world.submit("q", job="picky", priority=1)
    request = world.submit("p")
    world.tick()
    assert world.explain(request).rule == "NO_ROOM"
    waiting = world.explain(picky)
    assert waiting.rule == "QUARANTINE"
    assert waiting.reason == "1 of 1 samplers of 'tiny' are in quarantine for picky"
    behind = world.submit("q", priority=1)
    assert world.explain(behind).rule == "NO_ROOM", "nor of its own project's"


def test_a_place_that_only_others_may_have_is_a_quarantine():
    world = blocked()
    world.samplers.append(sampler_of("s1", refused_by=frozenset({"picky"})))
    picky = world.submit("q", job="picky")
    world.tick()
    assert world.explain(picky).rule == "QUARANTINE"
    world.submit("p", length=100)
    world.tick()
    assert world.explain(picky).rule == "NO_ROOM", "it may ask the other, which has no place"


def test_a_base_model_that_nobody_serves():
    world = blocked()
    request = world.submit(model="big")
    world.tick()
    waiting = world.explain(request)
    assert (waiting.rule, waiting.reason) == ("NO_SAMPLER", "no sampler of 'big' serves")
    assert waiting.release == "a sampler of 'big'"


def test_quotas_are_told_with_their_numbers():
    world = World(
        projects={"p": ProjectPolicy(max_tokens_in_flight=50, tokens_per_day=60)}, bound=100
    )
    world.submit(prompt=10, length=30, max_tokens=30)
    world.tick()
    request = world.submit(prompt=10, length=30, max_tokens=30)
    small = world.submit(prompt=0, length=10, max_tokens=10)
    world.tick()
    waiting = world.explain(request)
    assert waiting.rule == "PROJECT_TOKENS_IN_FLIGHT"
    assert waiting.reason == "40 of 50 tokens are in flight, and it counts 40"
    assert waiting.release.startswith("30 tokens fewer in flight, in about ")
    assert world.explain(small).rule == "ORDER"
    quotas = {
        quota.name: (quota.used, quota.allowed)
        for quota in world.scheduler.explain("p", "", world.now).quotas
    }
    assert quotas == {"tokens_in_flight": (40, 50), "tokens_per_day": (12, 60)}
    while request.id in world.waiting:
        world.tick()
    waiting = world.explain(small)
    assert waiting.rule == "PROJECT_TOKENS_PER_DAY"
    assert waiting.reason == (
        "51 of 60 tokens of today are used, and those in flight are expected to draw 29 more"
    )
    assert waiting.release == "midnight UTC, in 12.0 h, or sooner, if these end with fewer"
    while world.left:
        world.tick()
    waiting = world.explain(small)
    assert waiting.reason == "80 of 60 tokens of today are used"
    assert waiting.release == "midnight UTC, in 12.0 h"


def test_a_subject_is_a_job_or_a_request():
    world = blocked()
    jobs = ["projects/p/jobs/a", "projects/p/jobs/b"]
    requests = [world.submit(job=job) for job in jobs for _ in range(2)]
    world.submit("q")
    explain = world.scheduler.explain
    world.scheduler.record("p", Decision(NOON, jobs[0], "STARTED", "its {turn}"))
    schedule = explain("p", jobs[0], world.now)
    assert [waiting.subject for waiting in schedule.waiting] == [r.subject for r in requests[:2]]
    assert schedule.num_waiting == 2
    assert [decision.reason for decision in schedule.decisions] == ["its {turn}"]
    assert explain("p", jobs[1], world.now).decisions == ()
    assert explain("p", requests[3].subject, world.now).waiting[0].position == 5
    assert explain("p", "", world.now).num_waiting == 4


def test_no_more_than_so_many_are_told_of():
    world = blocked()
    for _ in range(MAX_WAITING + 5):
        world.submit("p")
    schedule = world.scheduler.explain("p", "", world.now)
    assert len(schedule.waiting) == MAX_WAITING
    assert schedule.num_waiting == MAX_WAITING + 5
    assert [waiting.position for waiting in schedule.waiting] == list(range(1, MAX_WAITING + 1))


def test_the_order_that_is_told_is_the_order_in_which_they_go():
    rng = random.Random(0)
    world = blocked()
    for _ in range(40):
        world.submit(rng.choice("abc"), priority=rng.choice([-1, 0, 1]), prompt=rng.randint(1, 50))
    told = sorted(
        (waiting.position, waiting.subject)
        for project in "abc"
        for waiting in world.scheduler.explain(project, "", world.now).waiting
    )
    assert [position for position, _ in told] == list(range(1, 41))
    gone = []
    while world.waiting:
        (running,) = world.left
        # As many as were expected: nothing is given back, which would change the order.
        world.scheduler.progress(running.id, num_tokens=64, num_finished=1)
        world.finish(running)
        gone += world.assign()
    assert [request.subject for request in gone] == [subject for _, subject in told]


class Relief:
    """Takes away what holds a request back, by the rule that is told; `holds`: whether it does."""

    def __init__(self, world, request, policy):
        self.world = world
        self.request = request
        self.policy = policy

    def may_ask(self):
        return [
            sampler
            for sampler in self.world.samplers
            if sampler.base_model == self.request.base_model
            and self.request.job not in sampler.refused_by
        ]

    def ahead(self, rule):
        """Those that may go before it by a rule of order."""
        request = self.request
        return [
            other
            for other in self.world.waiting.values()
            if other.base_model == request.base_model
            and {
                "PRIORITY": other.priority > request.priority,
                "ORDER": other.project == request.project
                and other.priority == request.priority
                and other.id != request.id,
                "FAIR_SHARE": other.project != request.project
                and other.priority == request.priority,
            }[rule]
        ]

    def own_running(self):
        return [request for request in self.world.left if request.project == self.request.project]

    def first(self):
        """The one that tokens in flight are kept for."""
        reason = self.world.explain(self.request).reason
        waiting = self.world.waiting.values()
        return next((r for r in waiting if reason.endswith(f"kept for {r.subject}")), None)

    def holds(self, rule):
        world = self.world
        match rule:
            case "PRIORITY" | "ORDER" | "FAIR_SHARE":
                return bool(self.ahead(rule))
            case "NO_ROOM":
                return all(
                    s.full or world.running(s.address) >= world.bound for s in self.may_ask()
                )
            case "NO_SAMPLER":
                return not any(s.base_model == self.request.base_model for s in world.samplers)
            case "QUARANTINE":
                return any(self.request.job in sampler.refused_by for sampler in world.samplers)
            case "PROJECT_TOKENS_IN_FLIGHT":
                return bool(self.own_running() or self.first())
            case "PROJECT_TOKENS_PER_DAY":
                used = world.scheduler.used_today(self.request.project, world.now)
                return used >= self.policy.tokens_per_day or bool(self.own_running())

    def cut_off(self, running):
        for request in running:
            # It gets what it was charged in advance: given back, that would change the turns.
            standing = self.world.scheduler._places.running[request.id]
            left = standing.charged - standing.num_tokens - request.num_prompt_tokens
            self.world.scheduler.progress(request.id, num_tokens=left, num_finished=0)
            self.world.finish(request, completed=False)

    def relieve(self, rule):
        world = self.world
        match rule:
            case "PRIORITY" | "ORDER" | "FAIR_SHARE":
                for other in self.ahead(rule):
                    world.withdraw(other)
            case "NO_ROOM":
                world.samplers = [replace(sampler, full=False) for sampler in world.samplers]
                self.cut_off(list(world.left))
            case "NO_SAMPLER":
                world.samplers.append(SamplerState("new", self.request.base_model, ()))
            case "QUARANTINE":
                world.samplers = [replace(s, refused_by=frozenset()) for s in world.samplers]
            case "PROJECT_TOKENS_IN_FLIGHT":
                if first := self.first():
                    world.withdraw(first)
                self.cut_off(self.own_running())
            case "PROJECT_TOKENS_PER_DAY":
                world.now += 86400


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 1_000_000), quotas=st.booleans())
def test_the_rule_that_is_told_holds_and_without_it_a_request_is_assigned(seed, quotas):
    rng = random.Random(seed)
    policy = ProjectPolicy()
    if quotas:
        policy = ProjectPolicy(max_tokens_in_flight=60, tokens_per_day=400)
    world = World(bound=2, projects=dict.fromkeys("abc", policy))
    world.samplers = [
        SamplerState(
            f"s{number}",
            rng.choice(["tiny", "big"]),
            (),
            full=rng.random() < 0.1,
            refused_by=frozenset(rng.sample(["x", "y"], rng.randint(0, 2))),
        )
        for number in range(rng.randint(0, 4))
    ]
    for _ in range(rng.randint(1, 5)):
        for _ in range(rng.randint(1, 5)):
            world.submit(
                rng.choice("abc"),
                model=rng.choice(["tiny", "big"]),
                job=rng.choice("xyz"),
                priority=rng.choice([-1, 0, 1]),
                completions=rng.randint(1, 3),
                max_tokens=20,
                length=rng.randint(5, 20),
            )
        world.tick()
    if not world.waiting:
        return
    world.assign()
    request = rng.choice(list(world.waiting.values()))
    relief = Relief(world, request, policy)
    told = []
    while request.id in world.waiting:
        rule = world.explain(request).rule
        assert relief.holds(rule)
        told.append(rule)
        relief.relieve(rule)
        world.assign()
        if not quotas:
            assert rule != "NO_ROOM" or request.id not in world.waiting, "it was next"
            # What stood in others' way as well gives them their turns, once.
            assert told.count(rule) <= 2
    assert len(told) <= 20
