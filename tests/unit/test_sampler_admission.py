"""Key-value memory, and the queue in front of the engine."""

from __future__ import annotations

import contextlib
import random

import pytest

from rollmesh.errors import Overloaded
from services.sampler.admission import Memory, Queue, Request
from services.sampler.turn_slot import Swap
from services.sampler.turns import MAX_PASSED, PATIENCE, Turns


def request(shared=0, each=0, num=1, adapter=None):
    return Request(adapter, shared, each, num)


def opened(kv_tokens, *, overcommit=1.0, max_completions=1000):
    memory = Memory(overcommit=overcommit, max_completions=max_completions)
    memory.open(kv_tokens)
    return memory, Turns(memory, quantum_s=1.0)


def begun(turns, *requests):
    for each in requests:
        turns.arrive(each)
    return turns.begin()


def test_the_prompt_counts_once_and_max_tokens_for_each_completion():
    memory, turns = opened(100)
    first, second = request(10, 20, 3), request(10, 20, 1)
    assert begun(turns, first) == [first]
    assert memory.reserved_tokens == 70
    assert begun(turns, second) == [second]
    assert memory.reserved_tokens == 100
    assert begun(turns, request(1, 0, 1)) == []


def test_memory_is_lent_out_as_often_as_the_configuration_says():
    _, turns = opened(100, overcommit=2.0)
    assert len(begun(turns, *(request(10, 40) for _ in range(5)))) == 4


def test_an_ended_completion_makes_room_for_the_next_request_at_once():
    _, turns = opened(100)
    first, second = request(20, 40, 2), request(20, 20)
    assert begun(turns, first, second) == [first]
    turns.end_one(first, 0.0)
    assert turns.begin() == [second]


def test_a_request_larger_than_the_memory_reserves_all_of_it_and_leaves_what_is_overcommitted():
    memory, turns = opened(100, overcommit=1.5)
    large, late = request(10, 40, 4), request(10, 40)
    assert begun(turns, large, late) == [large, late]
    assert memory.reserved_tokens == 150
    assert begun(turns, request(1, 0)) == []
    turns.end_one(large, 0.0)
    assert memory.reserved_tokens == 150, "the other three may still need all of it"
    turns.end_one(large, 0.0)
    assert memory.reserved_tokens == 90 + 50
    turns.end(large, 0.0)
    turns.end(late, 0.0)
    assert memory.reserved_tokens == 0


def test_smaller_requests_pass_one_that_waits_for_memory_within_an_adapter_and_across():
    _, turns = opened(100)
    first, large, late = request(10, 40), request(10, 90), request(10, 40)
    assert begun(turns, first, large, late) == [first, late]
    turns.end(first, 0.0)
    assert turns.begin() == []
    turns.end(late, 0.0)
    assert turns.begin() == [large]


def test_a_large_request_is_passed_so_often_and_then_begins_before_all_others():
    _, turns = opened(100)
    large = request(0, 500)
    running = begun(turns, request(0, 10), large)
    for _ in range(2 * MAX_PASSED):
        # Two come for each that ends: without a bound there is never room for the large one.
        running += begun(turns, request(0, 10), request(0, 10))
        turns.end(running.pop(0), 0.0)
        running += turns.begin()
        if large.running:
            break
    assert running == [large], "nobody else begins before it has"
    assert large.num_passed == MAX_PASSED
    turns.end(large, 0.0)
    assert len(turns.begin()) == 10


def test_two_large_requests_keep_their_order_and_the_small_ones_go_on_between():
    _, turns = opened(100)
    first, second = request(0, 500), request(0, 500)
    running = begun(turns, request(0, 60), first, second)
    began = []
    for _ in range(4 * MAX_PASSED):
        running += begun(turns, request(0, 30))
        began += [each for each in running if each not in began]
        turns.end(running.pop(0), 0.0)
        running += turns.begin()
    large = [began.index(first), began.index(second)]
    assert 0 < large[0] < large[1]
    assert len(began) > large[1] + 1


def test_an_older_request_that_fits_goes_first():
    _, turns = opened(100)
    first, old, young = request(0, 90), request(0, 60), request(0, 60)
    assert begun(turns, first, old, young) == [first]
    turns.end(first, 0.0)
    assert turns.begin() == [old]


def test_a_request_given_up_while_it_waits_leaves_its_place_to_the_next():
    memory, turns = opened(100)
    first, large, late = request(10, 80), request(10, 90), request(0, 10)
    large.num_passed = MAX_PASSED
    assert begun(turns, first, large, late) == [first]
    turns.end(large, 0.0)
    assert turns.begin() == [late]
    turns.end(first, 0.0)
    turns.end(late, 0.0)
    assert memory.reserved_tokens == 0


def test_an_unbounded_memory_still_has_a_batch():
    _, turns = opened(0, max_completions=4)
    requests = [request(10, 10**9, 3) for _ in range(3)]
    assert begun(turns, *requests) == requests[:2]
    turns.end(requests[0], 0.0)
    assert turns.begin() == requests[2:]


@pytest.mark.parametrize("seed", range(20))
def test_reservations_stay_within_the_bound_and_come_back_whatever_happens(seed):
    draw = random.Random(seed)
    memory, turns = opened(100, overcommit=1.5)
    waiting, running = [], []
    for now in range(500):
        event = draw.random()
        if event < 0.4:
            made = request(draw.randint(1, 60), draw.randint(1, 60), draw.randint(1, 3))
            turns.arrive(made)
            waiting.append(made)
        elif event < 0.7 and running:
            chosen = draw.choice(running)
            if chosen.num_completions > 1:
                turns.end_one(chosen, now)
            else:
                running.remove(chosen)
                turns.end(chosen, now)
        elif event < 0.8 and running + waiting:
            chosen = draw.choice(running + waiting)
            (running if chosen in running else waiting).remove(chosen)
            turns.end(chosen, now)
        before = {each: each.num_passed for each in waiting}
        started = turns.begin()
        for each in started:
            older = waiting[: waiting.index(each)]
            waiting.remove(each)
            assert all(before[other] < other.num_passed <= MAX_PASSED for other in older)
        running += started
        assert memory.reserved_tokens == sum(min(each.num_tokens, 100) for each in running) <= 150
        assert running or not waiting, "nothing runs, and somebody waits"
    for each in waiting + running:
        turns.end(each, 500)
    assert memory.reserved_tokens == 0


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_full_queue_says_when_a_place_is_likely_to_be_free():
    clock = Clock()
    queue = Queue(1, "requests", clock)
    with queue.waiting("p"), pytest.raises(Overloaded) as unknown, queue.waiting("p"):
        pass
    for _ in range(10):
        clock.now += 0.4
        with queue.waiting("p"):
            pass
    clock.now += 0.4
    with queue.waiting("p"):
        with pytest.raises(Overloaded) as steady, queue.waiting("p"):
            pass
        clock.now += 20
        with pytest.raises(Overloaded) as stuck, queue.waiting("p"):
            pass
        clock.now += 10_000
        with pytest.raises(Overloaded) as dead, queue.waiting("p"):
            pass
    assert steady.value.retry_after_s == pytest.approx(0.4)
    assert stuck.value.retry_after_s > 2
    assert dead.value.retry_after_s == 30
    assert unknown.value.retry_after_s == Overloaded.retry_after_s == 1.0
    assert queue.num_queued == 0


def test_who_gives_up_waiting_does_not_make_the_queue_look_fast():
    clock = Clock()
    queue = Queue(4, "requests", clock)
    with queue.waiting("p"):
        clock.now += 2
    clock.now += 8
    for _ in range(5):
        with pytest.raises(KeyError), queue.waiting("p"):
            raise KeyError
    with (
        queue.waiting("p"),
        queue.waiting("p"),
        pytest.raises(Overloaded) as caught,
        queue.waiting("p"),
    ):
        pass
    assert caught.value.retry_after_s == pytest.approx(8)


def test_one_project_has_at_most_half_of_the_places_and_the_refusal_names_it():
    queue = Queue(5, "pulls", Clock())
    with contextlib.ExitStack() as waiting:
        for _ in range(3):
            waiting.enter_context(queue.waiting("p"))
        with pytest.raises(Overloaded, match="3 pulls of project p") as mine, queue.waiting("p"):
            pass
        for _ in range(2):
            waiting.enter_context(queue.waiting("q"))
        with pytest.raises(Overloaded, match="5 pulls wait") as all_of_them, queue.waiting("q"):
            pass
        assert queue.num_queued == 5
    assert mine.value.context == {"resource": "pulls", "project": "p", "limit": "3"}
    assert all_of_them.value.context == {"resource": "pulls", "project": "q", "limit": "5"}
    assert queue.num_queued == 0
    assert not queue._queued, "nothing is kept of a project that was here"


def in_slots(turns, *adapters, policy=str):
    """Adapters that are in slots, with nothing to do; their policies are `policy` of them."""
    turns.open(len(adapters))
    for adapter in adapters:
        one = Request(adapter, num_completions=0, policy=policy(adapter))
        turns.arrive(one)
        assert turns.swap(0.0).into == adapter
        turns.loaded(adapter, 0.0)


def test_the_next_to_begin_is_of_the_adapter_that_runs_least():
    _, turns = opened(0, max_completions=6)
    in_slots(turns, 1, 2)
    many = [request(num=2, adapter=1) for _ in range(5)]
    assert begun(turns, *many) == many[:3]
    few = [request(num=2, adapter=2) for _ in range(2)]
    turns.end(many[0], 1.0)
    assert begun(turns, *few) == few[:1]
    turns.end(many[1], 2.0)
    assert turns.begin() == [many[3]], "of two adapters that run 2 each, the oldest"
    turns.end(few[0], 3.0)
    assert turns.begin() == [few[1]]


def test_beside_a_full_batch_begins_one_of_an_adapter_that_runs_none():
    _, turns = opened(0, max_completions=2)
    in_slots(turns, 1, 2)
    full = request(num=2, adapter=1)
    first, second, base = request(adapter=2), request(adapter=2), request()
    assert begun(turns, full, request(adapter=1), first, second, base) == [full, first, base]
    turns.end(first, 1.0)
    assert turns.begin() == [second]


def one_waits_outside(policy):
    """Turns of 1.0 s, over in both slots, while adapter 3 has begun to wait for one of them."""
    _, turns = opened(0)
    in_slots(turns, 1, 2)
    assert len(begun(turns, request(adapter=1), request(adapter=2))) == 2
    turns.arrive(Request(3, num_completions=1, policy=policy))
    assert turns.swap(10.0) is None
    assert turns.next_at(10.0) == 10.0 + PATIENCE
    return turns


def still_begin(turns, *, now):
    """Of which of the adapters in slots requests begin."""
    assert turns.swap(now) is None
    return {each.adapter for each in begun(turns, request(adapter=1), request(adapter=2))}


def test_a_turn_ends_only_for_one_that_has_waited_for_a_part_of_it():
    turns = one_waits_outside("3")
    assert still_begin(turns, now=9.99 + PATIENCE) == {1, 2}
    assert still_begin(turns, now=10.0 + PATIENCE) == {2}


def test_one_more_version_of_a_policy_ends_no_turn_of_another_policy():
    turns = one_waits_outside("2")
    assert still_begin(turns, now=10.0 + PATIENCE) == {1}
    turns = one_waits_outside("2")
    for number in range(4, 10):
        turns.arrive(Request(number, num_completions=1, policy="2"))
    assert still_begin(turns, now=10.0 + PATIENCE) == {1}
    assert still_begin(turns, now=99.0) == {1}


@pytest.mark.parametrize(("policy", "waits"), [("2", False), ("3", True)])
def test_an_idle_slot_waits_for_more_unless_another_version_of_its_policy_does(policy, waits):
    _, turns = opened(0)
    in_slots(turns, 1, 2)
    turns._quantum.note_load(1.0)
    used = request(adapter=2)
    assert used in begun(turns, request(adapter=1), used)
    turns.end(used, 0.5)
    turns.arrive(Request(3, num_completions=1, policy=policy))
    assert turns.swap(0.5) == (None if waits else Swap(2, 3))
