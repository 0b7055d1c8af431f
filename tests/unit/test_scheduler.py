"""The scheduler's policy, in a world where each running completion gets one token per tick."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollmesh.errors import Overloaded
from services.coordinator.scheduler import Request, SamplerState, Scheduler


class World:
    """Samplers that decode; `order` is who was assigned, `tokens` what each project got."""

    def __init__(self, *, samplers=1, bound=8, queue=10_000, weights=None, loaded=()):
        self.scheduler = Scheduler(
            max_running_completions=bound, max_queued_requests=queue, weights=weights
        )
        self.bound = bound
        self.samplers = [SamplerState(f"s{n}", "tiny", loaded) for n in range(samplers)]
        self.tokens = Counter()
        self.order = []
        self.assigned = Counter()
        self.left = {}
        self.lengths = {}
        self.address = {}
        self.next_id = 0

    def submit(self, project, *, length=10, completions=1, prompt=5, model="tiny", policy=None):
        self.next_id += 1
        request = Request(self.next_id, project, model, policy, prompt, completions)
        self.lengths[request.id] = length
        self.scheduler.submit(request)
        return request

    def tick(self):
        self.assign()
        self.decode()

    def assign(self):
        for assignment in self.scheduler.assign(self.samplers):
            request = assignment.request
            self.order.append(request.project)
            self.assigned[request.project] += 1
            self.address[request.id] = assignment.address
            self.left[request] = [self.lengths[request.id]] * request.num_completions
            self.tokens[request.project] += request.num_prompt_tokens

    def decode(self):
        for request, left in list(self.left.items()):
            ended = left.count(1)
            self.scheduler.progress(request.id, num_tokens=len(left), num_finished=ended)
            self.tokens[request.project] += len(left)
            self.left[request] = [tokens - 1 for tokens in left if tokens > 1]
            if not self.left[request]:
                del self.left[request]
                self.scheduler.finish(request.id, completed=True)

    def running(self, address):
        return sum(len(left) for r, left in self.left.items() if self.address[r.id] == address)


@pytest.mark.parametrize("samplers", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_tokens_are_shared_as_the_weights_say_whatever_the_shape_of_the_requests(samplers, seed):
    rng = random.Random(seed)
    world = World(samplers=samplers, weights={"a": 1.0, "b": 2.0, "c": 4.0})
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


def test_requests_of_one_project_are_first_come_first_served():
    world = World(bound=1)
    requests = [world.submit("a", length=2) for _ in range(5)]
    for _ in range(10):
        world.tick()
    assert list(world.address) == [request.id for request in requests]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_place_is_free_while_a_request_waits_and_none_runs_over_the_bound(data):
    world = World(samplers=2, bound=4, weights={"a": 1.0, "b": 3.0})
    for _ in range(30):
        for _ in range(data.draw(st.integers(0, 3))):
            world.submit(
                data.draw(st.sampled_from("abc")),
                length=data.draw(st.integers(1, 6)),
                completions=data.draw(st.integers(1, 4)),
            )
        world.assign()
        outstanding = [world.scheduler.outstanding(sampler.address) for sampler in world.samplers]
        assert outstanding == [world.running(sampler.address) for sampler in world.samplers]
        assert max(outstanding) < world.bound + 4
        assert min(outstanding) >= world.bound or world.scheduler.num_queued == 0
        world.decode()
    while world.scheduler.num_queued or world.left:
        world.tick()
    assert [world.scheduler.outstanding(sampler.address) for sampler in world.samplers] == [0, 0]


def test_a_busy_base_model_holds_up_no_other():
    world = World(bound=1)
    world.samplers.append(SamplerState("other", "big", ()))
    world.submit("a", length=100)
    world.tick()
    world.submit("a")
    big = world.submit("a", model="big")
    world.tick()
    assert world.address[big.id] == "other"


def test_a_request_goes_where_its_policy_is_loaded_then_where_least_runs():
    scheduler = Scheduler(max_running_completions=4, max_queued_requests=10)
    policy = ("projects/p/adapters/a", 3)
    samplers = [
        SamplerState("a", "tiny", ()),
        SamplerState("b", "tiny", {policy}),
        SamplerState("c", "tiny", {policy}),
    ]
    for number in range(4):
        scheduler.submit(Request(number, "p", "tiny", policy, 5, 3))
    assert [a.address for a in scheduler.assign(samplers)] == ["b", "c", "b", "c"]
    scheduler.submit(Request(9, "p", "tiny", policy, 5, 3))
    (last,) = scheduler.assign(samplers)
    assert last.address == "a", "one that has to load it is better than waiting"


def test_a_full_queue_is_refused_with_its_length_and_fills_nobody_elses():
    scheduler = Scheduler(max_running_completions=1, max_queued_requests=2)
    for number in range(2):
        scheduler.submit(Request(number, "flood", "tiny", None, 1, 1))
    with pytest.raises(Overloaded) as caught:
        scheduler.submit(Request(2, "flood", "tiny", None, 1, 1))
    assert caught.value.context == {
        "project": "flood",
        "base_model": "tiny",
        "value": "2",
        "allowed": "2",
    }
    assert caught.value.retry_after_s > 0
    scheduler.submit(Request(3, "light", "tiny", None, 1, 1))
    assert scheduler.num_queued == 3


def test_a_withdrawn_request_is_never_assigned():
    scheduler = Scheduler(max_running_completions=9, max_queued_requests=9)
    kept = Request(1, "p", "tiny", None, 1, 1)
    gone = Request(2, "p", "tiny", None, 1, 1)
    scheduler.submit(gone)
    scheduler.submit(kept)
    scheduler.withdraw(gone)
    sampler = SamplerState("s", "tiny", ())
    assert [assignment.request for assignment in scheduler.assign([sampler])] == [kept]


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
            world.scheduler.finish(request.id, completed=False)
            del world.left[request]
    tokens = world.tokens
    assert tokens["a"] == pytest.approx(tokens["b"], rel=0.1)
    assert Counter(world.order)["a"] > 80
