"""The scheduler's queues and places: order, bounds, quarantine, and that no place stays free."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollmesh.errors import Overloaded
from services.coordinator.scheduler.decisions import MAX_DECISIONS, MAX_PROJECTS
from tests.fakes.scheduling import (
    NOON,
    SamplerState,
    World,
    request_of,
    sampler_of,
    scheduler_of,
    weighted,
)


def test_requests_of_one_project_are_first_come_first_served():
    world = World(bound=1)
    requests = [world.submit("a", length=2) for _ in range(5)]
    for _ in range(10):
        world.tick()
    assert list(world.address) == [request.id for request in requests]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_place_is_free_while_a_request_waits_and_none_runs_over_the_bound(data):
    world = World(samplers=2, bound=4, projects=weighted(a=1.0, b=3.0))
    for _ in range(30):
        for _ in range(data.draw(st.integers(0, 3))):
            world.submit(
                data.draw(st.sampled_from("abc")),
                length=data.draw(st.integers(1, 6)),
                completions=data.draw(st.integers(1, 4)),
                priority=data.draw(st.sampled_from([-1, 0, 1])),
            )
        world.assign()
        for request in world.named():
            world.stop(request)
        world.assign()
        outstanding = [world.scheduler.outstanding(sampler.address) for sampler in world.samplers]
        assert outstanding == [world.running(sampler.address) for sampler in world.samplers]
        assert max(outstanding) < world.bound + 4
        assert min(outstanding) >= world.bound or world.scheduler.num_queued == 0
        assert world.scheduler.num_queued == len(world.waiting)
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


@pytest.mark.parametrize("other", ["another", "p"])
def test_a_job_that_refuses_a_sampler_waits_for_another_and_holds_up_nobody(other):
    world = World(samplers=1)
    world.samplers = [replace(world.samplers[0], refused_by=frozenset({"picky"}))]
    picky = world.submit("p", job="picky")
    for _ in range(3):
        world.submit(other)
    for _ in range(40):
        world.tick()
    assert world.order == [other] * 3
    world.samplers.append(sampler_of("s1"))
    world.tick()
    assert world.address[picky.id] == "s1"


def test_a_job_that_refuses_the_free_sampler_gets_its_place_on_another_when_there_is_one():
    world = World(bound=1)
    other = world.submit("q", length=100)
    world.assign()
    world.samplers.append(sampler_of("s1", refused_by=frozenset({"picky"})))
    picky = world.submit("p", job="picky")
    assert world.assign() == []
    world.finish(other, completed=False)
    assert world.assign() == [picky]


def test_a_project_whose_job_is_in_quarantine_everywhere_goes_on_with_the_next_that_comes():
    world = World(bound=1)
    world.samplers = [replace(world.samplers[0], refused_by=frozenset({"picky"}))]
    world.submit("p", job="picky")
    assert world.assign() == []
    next_one = world.submit("p")
    assert world.assign() == [next_one]


def test_a_sampler_that_comes_back_has_the_places_that_it_had():
    world = World(bound=2)
    running = [world.submit(length=100) for _ in range(2)]
    world.tick()
    here, world.samplers = world.samplers, []
    waits = world.submit()
    world.tick()
    world.samplers = here
    world.tick()
    assert waits.id in world.waiting
    world.finish(running[0], completed=False)
    world.tick()
    assert waits.id not in world.waiting


def test_a_full_sampler_is_given_nothing_until_it_is_not():
    world = World()
    (sampler,) = world.samplers
    world.samplers = [replace(sampler, full=True)]
    world.submit()
    assert world.assign() == []
    world.samplers = [sampler]
    assert len(world.assign()) == 1


def test_a_resumed_request_goes_before_its_project_and_into_a_full_queue_but_not_before_others():
    scheduler = scheduler_of(bound=1, queue=1)
    scheduler.submit(request_of(1), NOON)
    scheduler.submit(request_of(2, resumed=True), NOON)
    scheduler.submit(request_of(3, project="q"), NOON)
    samplers = [sampler_of(name) for name in "abc"]
    order = [assignment.request.id for assignment in scheduler.assign(samplers, NOON)]
    assert order.index(2) < order.index(1)
    assert sorted(order) == [1, 2, 3]


def test_resumed_requests_keep_the_order_in_which_they_came_back():
    scheduler = scheduler_of(bound=100, queue=9)
    for number, resumed in enumerate([False, True, True, False, True]):
        scheduler.submit(request_of(number, resumed=resumed), NOON)
    order = [assignment.request.id for assignment in scheduler.assign([sampler_of("a")], NOON)]
    assert order == [1, 2, 4, 0, 3]


def test_the_rest_of_a_resumed_request_is_not_taken_for_the_length_of_its_completions():
    scheduler = scheduler_of(bound=100)
    for number, (num_tokens, resumed) in enumerate([(40, False), (1, True)]):
        request = request_of(number, None, prompt=0, max_tokens=None, resumed=resumed)
        scheduler.submit(request, NOON)
        scheduler.assign([sampler_of("a")], NOON)
        scheduler.progress(number, num_tokens=num_tokens, num_finished=1)
        scheduler.finish(number, completed=True, now=NOON)
    scheduler.submit(request_of(9, None, prompt=0, max_tokens=None), NOON)
    scheduler.assign([sampler_of("a")], NOON)
    assert scheduler.outstanding_tokens("a") == 40


def test_a_full_queue_is_refused_with_its_length_and_fills_nobody_elses():
    scheduler = scheduler_of(queue=2)
    for number in range(2):
        scheduler.submit(request_of(number, project="flood"), NOON)
    with pytest.raises(Overloaded) as caught:
        scheduler.submit(request_of(2, project="flood"), NOON)
    assert caught.value.context == {
        "project": "flood",
        "base_model": "tiny",
        "value": "2",
        "allowed": "2",
        "position": "3",
    }
    assert caught.value.retry_after_s > 0
    scheduler.submit(request_of(3, project="light"), NOON)
    assert scheduler.num_queued == 3
    (refused,) = scheduler.explain("flood", "", NOON).decisions
    assert (refused.action, refused.subject) == ("REFUSED", "projects/flood/requests/2")
    assert refused.reason == str(caught.value)


def test_a_withdrawn_request_is_never_assigned():
    scheduler = scheduler_of()
    gone, kept = request_of(1), request_of(2)
    scheduler.submit(gone, NOON)
    scheduler.submit(kept, NOON)
    scheduler.withdraw(gone)
    assignments = scheduler.assign([sampler_of("s")], NOON)
    assert [assignment.request for assignment in assignments] == [kept]


def test_decisions_are_bounded_by_project_and_in_the_number_of_projects():
    world = World(bound=10_000)
    for _ in range(MAX_DECISIONS + 20):
        world.submit("many", length=1)
        world.tick()
    decisions = world.scheduler.explain("many", "", world.now).decisions
    assert len(decisions) == MAX_DECISIONS
    assert [decision.time for decision in decisions] == sorted(
        (decision.time for decision in decisions), reverse=True
    )
    assert decisions[0].subject == f"projects/many/requests/{world.next_id}"
    for project in ("p0", "many"):
        world.submit(project)
        world.tick()
    for number in range(1, MAX_PROJECTS):
        world.submit(f"p{number}")
    world.tick()
    assert world.scheduler.explain("p0", "", world.now).decisions == ()
    assert world.scheduler.explain("many", "", world.now).decisions != (), "decided of since"
    world.submit("one more")
    world.tick()
    assert world.scheduler.explain("many", "", world.now).decisions == ()
