"""The scheduler's policy, in a world where each running completion gets one token per tick."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollmesh.errors import Overloaded
from services.coordinator.scheduler import Request, SamplerState, Scheduler, prefixes_of
from services.coordinator.scheduler.routing import MAX_PREFIXES, Prefixes


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

    def submit(
        self, project, *, length=10, completions=1, prompt=5, model="tiny", policy=None, job=""
    ):
        self.next_id += 1
        request = Request(self.next_id, project, model, policy, prompt, completions, job=job)
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


@pytest.mark.parametrize("other", ["another project", "p"])
def test_a_job_that_refuses_a_sampler_waits_for_another_and_holds_up_nobody(other):
    world = World(samplers=1)
    world.samplers = [replace(world.samplers[0], refused_by=frozenset({"picky"}))]
    picky = world.submit("p", job="picky")
    for _ in range(3):
        world.submit(other)
    for _ in range(40):
        world.tick()
    assert world.order == [other] * 3
    world.samplers.append(SamplerState("s1", "tiny", ()))
    world.tick()
    assert world.address[picky.id] == "s1"


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


A, B, C = (("projects/p/adapters/" + name, 3) for name in "abc")


def request_of(number=0, policy=A, *, prompt=8, completions=1, max_tokens=16, **options):
    return Request(number, "p", "tiny", policy, prompt, completions, max_tokens, **options)


def sampler_of(address, loaded=(), **options):
    return SamplerState(address, "tiny", loaded, **options)


def chosen(*samplers, request=None, before=()):
    """Where `request` goes, after each of `before` went to the sampler named with it."""
    scheduler = Scheduler(max_running_completions=256, max_queued_requests=10)
    for number, (address, earlier) in enumerate(before):
        scheduler.submit(replace(earlier, id=-1 - number))
        scheduler.assign([replace(s, full=s.address != address) for s in samplers])
    scheduler.submit(request or request_of())
    (assignment,) = scheduler.assign(samplers)
    return assignment.address


ROUTES = {
    "equal ones: the first": ("a", [sampler_of("b"), sampler_of("a")], {}),
    "pulled before not pulled": ("b", [sampler_of("a"), sampler_of("b", {A})], {}),
    "in a slot before pulled": (
        "b",
        [
            sampler_of("a", {A}, resident={B, C}, max_loras=2),
            sampler_of("b", {A}, resident={A, C}, max_loras=2),
        ],
        {},
    ),
    "a free slot before a taken one": (
        "b",
        [
            sampler_of("a", {A}, resident={B, C}, max_loras=2),
            sampler_of("b", {A}, resident={B}, max_loras=2),
        ],
        {},
    ),
    "a slot that a running policy takes is taken": (
        "b",
        [sampler_of("a", {A}, max_loras=1), sampler_of("b", {A}, max_loras=1, num_queued=1)],
        {"before": [("a", request_of(policy=B, prompt=0, max_tokens=1))]},
    ),
    "where the policy runs, though nobody has told of it yet": (
        "b",
        [sampler_of("a", {A}), sampler_of("b", {A})],
        {"before": [("b", request_of())]},
    ),
    "a line here is longer than the way to a slot there": (
        "b",
        [sampler_of("a", {A}, resident={A}), sampler_of("b", {A})],
        {"before": [("a", request_of(completions=64))]},
    ),
    "a long line is longer than a pull": (
        "b",
        [sampler_of("a", {A}, resident={A}), sampler_of("b")],
        {"before": [("a", request_of(completions=128))]},
    ),
    "a short line is not": (
        "a",
        [sampler_of("a", {A}, resident={A}), sampler_of("b")],
        {"before": [("a", request_of(completions=32))]},
    ),
    "tokens count and not completions": (
        "b",
        [sampler_of("a"), sampler_of("b")],
        {
            "before": [("a", request_of(max_tokens=200)), ("b", request_of(completions=2))],
            "request": request_of(policy=None),
        },
    ),
    "long prompts count": (
        "b",
        [sampler_of("a"), sampler_of("b")],
        {
            "before": [("a", request_of(prompt=4000)), ("b", request_of(completions=4))],
            "request": request_of(policy=None),
        },
    ),
    "what waits in the sampler counts": (
        "b",
        [sampler_of("a", {A}, num_queued=40), sampler_of("b")],
        {},
    ),
    "not where it was lost": (
        "b",
        [sampler_of("a", {A}), sampler_of("b")],
        {"request": request_of(avoid="a")},
    ),
    "back to where it was lost when there is no other": (
        "a",
        [sampler_of("a", {A})],
        {"request": request_of(avoid="a")},
    ),
    "not where there is no room": (
        "b",
        [sampler_of("a", {A}, full=True), sampler_of("b", num_queued=100)],
        {},
    ),
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_request_goes_where_it_costs_least(route):
    address, samplers, options = ROUTES[route]
    assert chosen(*samplers, **options) == address
    assert chosen(*reversed(samplers), **options) == address, "whatever their order"


def prompt_of(number, length):
    return [number] * length


def prefixed(prompt, policy=None, project="p"):
    prefixes = prefixes_of(project, policy, prompt)
    return request_of(policy=policy, prompt=len(prompt), prefixes=prefixes)


@pytest.mark.parametrize(
    ("seen", "asked", "address"),
    [
        (prefixed(prompt_of(1, 256)), prefixed([*prompt_of(1, 256), 2]), "b"),
        (prefixed(prompt_of(1, 256)), prefixed([*prompt_of(1, 255), 2, 3]), "b"),
        (prefixed(prompt_of(1, 256)), prefixed(prompt_of(2, 256)), "a"),
        (prefixed(prompt_of(1, 256)), prefixed(prompt_of(1, 256), project="q"), "a"),
        (prefixed(prompt_of(1, 20)), prefixed(prompt_of(1, 20)), "a"),
    ],
)
def test_a_request_goes_where_its_prompt_was_begun_by_the_same_project(seen, asked, address):
    scheduler = Scheduler(max_running_completions=256, max_queued_requests=10)
    samplers = [sampler_of("a"), sampler_of("b")]
    scheduler.submit(replace(seen, id=1))
    scheduler.assign([replace(samplers[0], full=True), samplers[1]])
    scheduler.finish(1, completed=False)
    scheduler.submit(replace(asked, id=2))
    assert [assignment.address for assignment in scheduler.assign(samplers)] == [address]


def test_the_prefixes_of_another_version_are_other_prefixes():
    prompt = prompt_of(1, 64)
    keys = {
        key for policy in (None, A, (A[0], 4), B) for _, key in prefixes_of("p", policy, prompt)
    }
    assert len(keys) == 8
    assert [length for length, _ in prefixes_of("p", A, prompt_of(1, 129))] == [32, 64, 128]


def test_the_sampler_that_saw_more_of_a_prompt_is_preferred():
    prompt = list(range(600))
    before = [("b", prefixed(prompt[:130])), ("c", prefixed(prompt[:300])), ("a", prefixed([]))]
    samplers = [sampler_of(address) for address in "abc"]
    scheduler = Scheduler(max_running_completions=256, max_queued_requests=10)
    for number, (address, earlier) in enumerate(before):
        scheduler.submit(replace(earlier, id=number))
        scheduler.assign([replace(s, full=s.address != address) for s in samplers])
        scheduler.finish(number, completed=False)
    scheduler.submit(replace(prefixed(prompt), id=9))
    assert [assignment.address for assignment in scheduler.assign(samplers)] == ["c"]


def test_the_oldest_prefixes_are_forgotten_and_those_of_a_sampler_that_left():
    prefixes = Prefixes()
    first, *rest = (prefixed(prompt_of(n, 32)) for n in range(MAX_PREFIXES + 1))
    prefixes.remember(first)
    for request in rest[:-1]:
        prefixes.remember(request)
    assert prefixes.shared(first) == 32
    prefixes.remember(rest[-1])
    assert prefixes.shared(first) == 0
    assert prefixes.shared(rest[0]) == 32

    scheduler = Scheduler(max_running_completions=256, max_queued_requests=10)
    scheduler.submit(replace(first, id=1))
    scheduler.assign([sampler_of("b")])
    scheduler.finish(1, completed=False)
    scheduler.submit(replace(first, id=2))
    assert scheduler.assign([]) == []
    assert [a.address for a in scheduler.assign([sampler_of("a"), sampler_of("b")])] == ["a"]


@pytest.mark.parametrize("seed", range(3))
def test_requests_of_more_adapters_than_slots_keep_to_the_samplers_that_have_them(seed):
    """Two samplers of two slots each, which the two policies have that ran there last."""
    rng = random.Random(seed)
    policies = [(f"projects/p/adapters/{n}", 0) for n in range(4)]
    scheduler = Scheduler(max_running_completions=64, max_queued_requests=1000)
    slots = {"a": [], "b": []}
    switches = 0
    for number in range(400):
        policy = rng.choice(policies)
        scheduler.submit(request_of(number, policy, completions=2))
        samplers = [
            sampler_of(name, policies, resident=resident, max_loras=2)
            for name, resident in slots.items()
        ]
        (assignment,) = scheduler.assign(samplers)
        resident = slots[assignment.address]
        switches += policy not in resident
        slots[assignment.address] = [*(p for p in resident if p != policy), policy][-2:]
        if number >= 8:
            scheduler.finish(number - 8, completed=False)
    assert switches < 8, "each policy was put into a slot once, and a few changed theirs"


def test_a_group_stays_together():
    assert chosen(sampler_of("a"), sampler_of("b"), request=request_of(completions=100)) == "a"


@pytest.mark.parametrize("seed", range(40))
def test_outstanding_tokens_shrink_as_they_come_and_nothing_is_left_in_the_end(seed):
    rng = random.Random(seed)
    scheduler = Scheduler(max_running_completions=1000, max_queued_requests=1000)
    left = {number: rng.randint(1, 4) for number in range(rng.randint(1, 8))}
    for number, completions in left.items():
        prompt = rng.randint(1, 99)
        scheduler.submit(
            request_of(number, prompt=prompt, completions=completions, max_tokens=None)
        )
    scheduler.assign([sampler_of("a")])
    before = scheduler.outstanding_tokens("a")
    assert before > 0
    while left:
        number = rng.choice(sorted(left))
        ended = rng.randint(0, left[number])
        scheduler.progress(number, num_tokens=rng.randint(1, 99), num_finished=ended)
        left[number] -= ended
        if not left[number] or rng.random() < 0.2:
            del left[number]
            scheduler.finish(number, completed=rng.random() < 0.5)
        assert 0 <= scheduler.outstanding_tokens("a") <= before
        assert scheduler.outstanding("a") == sum(left.values())
        before = scheduler.outstanding_tokens("a")
    assert before == 0


def test_a_resumed_request_goes_before_its_project_and_into_a_full_queue_but_not_before_others():
    scheduler = Scheduler(max_running_completions=1, max_queued_requests=1)
    scheduler.submit(request_of(1))
    scheduler.submit(request_of(2, resumed=True))
    scheduler.submit(replace(request_of(3), project="q"))
    samplers = [sampler_of(name) for name in "abc"]
    order = [assignment.request.id for assignment in scheduler.assign(samplers)]
    assert order.index(2) < order.index(1)
    assert sorted(order) == [1, 2, 3]


def test_resumed_requests_keep_the_order_in_which_they_came_back():
    scheduler = Scheduler(max_running_completions=100, max_queued_requests=9)
    for number, resumed in enumerate([False, True, True, False, True]):
        scheduler.submit(request_of(number, resumed=resumed))
    order = [assignment.request.id for assignment in scheduler.assign([sampler_of("a")])]
    assert order == [1, 2, 4, 0, 3]


def test_the_rest_of_a_resumed_request_is_not_taken_for_the_length_of_its_completions():
    scheduler = Scheduler(max_running_completions=100, max_queued_requests=10)
    for number, (num_tokens, resumed) in enumerate([(40, False), (1, True)]):
        request = request_of(number, None, prompt=0, max_tokens=None, resumed=resumed)
        scheduler.submit(request)
        scheduler.assign([sampler_of("a")])
        scheduler.progress(number, num_tokens=num_tokens, num_finished=1)
        scheduler.finish(number, completed=True)
    scheduler.submit(request_of(9, None, prompt=0, max_tokens=None))
    scheduler.assign([sampler_of("a")])
    assert scheduler.outstanding_tokens("a") == 40


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
