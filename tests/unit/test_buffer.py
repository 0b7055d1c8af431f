"""Admission and order of a job's groups."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from services.coordinator.buffer import RolloutBuffer
from tests.fakes.virtual_time import simulate


def group(number):
    return SimpleNamespace(number=number)


def test_as_many_groups_are_admitted_as_there_are_slots_and_no_more_than_there_are_steps():
    buffer = RolloutBuffer(groups_per_step=2, max_staleness=1, first_step=3, last_step=6)
    assert list(buffer.admit()) == [6, 7, 8, 9]
    assert list(buffer.admit()) == []
    buffer.release(2)
    assert list(buffer.admit()) == [10, 11]
    buffer.release(2)
    assert list(buffer.admit()) == []


def test_groups_are_taken_in_the_order_of_their_numbers_whenever_they_arrive():
    async def scenario():
        buffer = RolloutBuffer(groups_per_step=2, max_staleness=1, first_step=0, last_step=2)
        buffer.admit()
        for number in (3, 1, 2):
            buffer.put(group(number))
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(buffer.take(2))
            await asyncio.sleep(100)
            assert not first.done(), "group 0 is not there yet, and nobody overtakes it"
            buffer.put(group(0))
        assert [taken.number for taken in first.result()] == [0, 1]
        assert [taken.number for taken in await buffer.take(2)] == [2, 3]

    simulate(scenario())


@settings(deadline=None)
@given(
    groups_per_step=st.integers(1, 5),
    max_staleness=st.integers(0, 4),
    first_step=st.integers(0, 5),
    num_steps=st.integers(1, 8),
)
def test_no_group_is_admitted_more_than_the_bound_before_its_step(
    groups_per_step, max_staleness, first_step, num_steps
):
    last_step = first_step + num_steps
    buffer = RolloutBuffer(
        groups_per_step=groups_per_step,
        max_staleness=max_staleness,
        first_step=first_step,
        last_step=last_step,
    )
    admitted = []
    for version in range(first_step, last_step):
        for number in buffer.admit():
            admitted.append(number)
            assert number // groups_per_step - version <= max_staleness
        buffer.release(groups_per_step)
    assert admitted == list(range(first_step * groups_per_step, last_step * groups_per_step))
