"""Which sampler a request goes to, and what is remembered for it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from services.coordinator.scheduler import prefixes_of
from services.coordinator.scheduler.routing import MAX_PREFIXES, Prefixes
from tests.fakes.scheduling import NOON, A, B, C, prefixed, request_of, sampler_of, scheduler_of


def test_a_request_goes_where_its_policy_is_loaded_then_where_least_runs():
    scheduler = scheduler_of(bound=4)
    samplers = [sampler_of("a"), sampler_of("b", {A}), sampler_of("c", {A})]
    for number in range(4):
        scheduler.submit(request_of(number, prompt=5, completions=3, max_tokens=None), NOON)
    addresses = [assignment.address for assignment in scheduler.assign(samplers, NOON)]
    assert addresses == ["b", "c", "b", "c"]
    scheduler.submit(request_of(9, prompt=5, completions=3, max_tokens=None), NOON)
    (last,) = scheduler.assign(samplers, NOON)
    assert last.address == "a", "one that has to load it is better than waiting"


def chosen(*samplers, request=None, before=()):
    """Where `request` goes, after each of `before` went to the sampler named with it."""
    scheduler = scheduler_of(bound=256, queue=10)
    for number, (address, earlier) in enumerate(before):
        scheduler.submit(replace(earlier, id=-1 - number), NOON)
        scheduler.assign([replace(s, full=s.address != address) for s in samplers], NOON)
    scheduler.submit(request or request_of(), NOON)
    (assignment,) = scheduler.assign(samplers, NOON)
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
    scheduler = scheduler_of(bound=256, queue=10)
    samplers = [sampler_of("a"), sampler_of("b")]
    scheduler.submit(replace(seen, id=1), NOON)
    scheduler.assign([replace(samplers[0], full=True), samplers[1]], NOON)
    scheduler.finish(1, completed=False, now=NOON)
    scheduler.submit(replace(asked, id=2), NOON)
    assert [assignment.address for assignment in scheduler.assign(samplers, NOON)] == [address]


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
    scheduler = scheduler_of(bound=256, queue=10)
    for number, (address, earlier) in enumerate(before):
        scheduler.submit(replace(earlier, id=number), NOON)
        scheduler.assign([replace(s, full=s.address != address) for s in samplers], NOON)
        scheduler.finish(number, completed=False, now=NOON)
    scheduler.submit(replace(prefixed(prompt), id=9), NOON)
    assert [assignment.address for assignment in scheduler.assign(samplers, NOON)] == ["c"]


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

    scheduler = scheduler_of(bound=256, queue=10)
    scheduler.submit(replace(first, id=1), NOON)
    scheduler.assign([sampler_of("b")], NOON)
    scheduler.finish(1, completed=False, now=NOON)
    scheduler.submit(replace(first, id=2), NOON)
    assert scheduler.assign([], NOON) == []
    assert [a.address for a in scheduler.assign([sampler_of("a"), sampler_of("b")], NOON)] == ["a"]


@pytest.mark.parametrize("seed", range(3))
def test_requests_of_more_adapters_than_slots_keep_to_the_samplers_that_have_them(seed):
    """Two samplers of two slots each, which the two policies have that ran there last."""
    rng = random.Random(seed)
    policies = [(f"projects/p/adapters/{n}", 0) for n in range(4)]
    scheduler = scheduler_of(bound=64, queue=1000)
    slots = {"a": [], "b": []}
    switches = 0
    for number in range(400):
        policy = rng.choice(policies)
        scheduler.submit(request_of(number, policy, completions=2), NOON)
        samplers = [
            sampler_of(name, policies, resident=resident, max_loras=2)
            for name, resident in slots.items()
        ]
        (assignment,) = scheduler.assign(samplers, NOON)
        resident = slots[assignment.address]
        switches += policy not in resident
        slots[assignment.address] = [*(p for p in resident if p != policy), policy][-2:]
        if number >= 8:
            scheduler.finish(number - 8, completed=False, now=NOON)
    assert switches < 8, "each policy was put into a slot once, and a few changed theirs"


def test_a_group_stays_together():
    assert chosen(sampler_of("a"), sampler_of("b"), request=request_of(completions=100)) == "a"


@pytest.mark.parametrize("seed", range(40))
def test_outstanding_tokens_shrink_as_they_come_and_nothing_is_left_in_the_end(seed):
    rng = random.Random(seed)
    scheduler = scheduler_of(bound=1000, queue=1000)
    left = {number: rng.randint(1, 4) for number in range(rng.randint(1, 8))}
    for number, completions in left.items():
        prompt = rng.randint(1, 99)
        scheduler.submit(
            request_of(number, prompt=prompt, completions=completions, max_tokens=None), NOON
        )
    scheduler.assign([sampler_of("a")], NOON)
    before = scheduler.outstanding_tokens("a")
    assert before > 0
    while left:
        number = rng.choice(sorted(left))
        ended = rng.randint(0, left[number])
        scheduler.progress(number, num_tokens=rng.randint(1, 99), num_finished=ended)
        left[number] -= ended
        if not left[number] or rng.random() < 0.2:
            del left[number]
            scheduler.finish(number, completed=rng.random() < 0.5, now=NOON)
        assert 0 <= scheduler.outstanding_tokens("a") <= before
        assert scheduler.outstanding("a") == sum(left.values())
        before = scheduler.outstanding_tokens("a")
    assert before == 0
