"""Finished groups as bytes, and how a job's supply of them goes on after an interruption."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollmesh.chat import Message, Role, ToolCall
from rollmesh.job import AlgorithmSpec
from rollmesh.types import AdapterSource, Completion, PolicySpan
from services.coordinator.batch import batch
from services.coordinator.datasets import Task
from services.coordinator.group_bytes import group_from_bytes, group_to_bytes
from services.coordinator.groups import Group, Rollout, Turn
from services.coordinator.rollouts import TaskOrder
from services.coordinator.supply import Supply
from services.coordinator.versions import Versions
from tests.fakes.job_mesh import TASKS, spec
from tests.fakes.virtual_time import simulate

SOURCE = AdapterSource("projects/p/adapters/a", 3, "digest-3", "trainer")
float32s = st.floats(width=32, allow_nan=True, allow_infinity=True)
tokens = st.integers(0, 2**31 - 1)


@st.composite
def completions(draw):
    token_ids = tuple(draw(st.lists(tokens, min_size=1, max_size=5)))
    logprobs = tuple(draw(st.lists(float32s, min_size=len(token_ids), max_size=len(token_ids))))
    cut = draw(st.integers(1, len(token_ids)))
    spans = [PolicySpan(cut, draw(st.integers(0, 9)), "digest", draw(st.text(max_size=4)))]
    if cut < len(token_ids):
        spans.append(PolicySpan(len(token_ids) - cut, 9, "other", "s2"))
    return Completion(token_ids, logprobs, tuple(spans), draw(st.sampled_from(["stop", "length"])))


finite = st.floats(allow_nan=False)
messages = st.builds(
    Message,
    st.sampled_from(get_args(Role)),
    st.text(max_size=4),
    st.lists(st.builds(ToolCall, st.text(), st.text(), st.text()), max_size=2).map(tuple),
    st.text(max_size=4),
)
rollouts = st.builds(
    Rollout,
    st.lists(st.builds(Turn, st.lists(tokens, min_size=1), completions()), min_size=1, max_size=3),
    finite,
    st.dictionaries(st.text(), finite, max_size=2),
    truncated=st.booleans(),
)


@st.composite
def groups(draw):
    drawn = draw(st.lists(rollouts, min_size=1, max_size=4))
    teacher = None
    if draw(st.booleans()):
        teacher = [
            draw(st.lists(float32s, min_size=r.num_drawn, max_size=r.num_drawn)) for r in drawn
        ]
    return Group(
        number=draw(st.integers(0, 2**40)),
        policy_version=draw(st.integers(0, 2**40)),
        task=Task(
            draw(st.text()),
            draw(st.dictionaries(st.text(), st.text())),
            draw(st.text()),
            tuple(draw(st.lists(messages, max_size=2))),
        ),
        rollouts=drawn,
        sample_s=draw(st.floats(0, 1e6)),
        reward_s=draw(st.floats(0, 1e6)),
        attempt=draw(st.integers(0, 100)),
        teacher_logprobs=teacher,
    )


@settings(max_examples=300)
@given(groups())
def test_a_group_comes_back_as_it_was_bit_for_bit(group):
    back = group_from_bytes(group_to_bytes(group))
    assert bits(back) == bits(group)


def bits(group):
    """All that is in it; NaN is not equal to itself, but its bits are."""
    return dataclasses.replace(
        group,
        rollouts=[
            dataclasses.replace(rollout, turns=[turn_bits(turn) for turn in rollout.turns])
            for rollout in group.rollouts
        ],
        teacher_logprobs=None
        if group.teacher_logprobs is None
        else [np.float32(row).tobytes() for row in group.teacher_logprobs],
    )


def turn_bits(turn):
    logprobs = np.float32(turn.completion.logprobs).tobytes()
    return Turn(turn.prompt_token_ids, dataclasses.replace(turn.completion, logprobs=logprobs))


def group_of(number, *, attempt=0, rewards=(0.0, 1.0), task=TASKS[0]):
    spans = (PolicySpan(2, 3, "digest-3", "s1"),)
    drawn = [
        Rollout([Turn([1, 2, 3], Completion((5, 6 + n), (-0.1, -1 / 3), spans, "stop"))], reward)
        for n, reward in enumerate(rewards)
    ]
    return Group(number, 3, task, drawn, 1.0, 0.5, attempt)


def test_the_batch_of_groups_that_were_kept_is_the_same_bit_for_bit():
    job = spec(algorithm={"groups_per_step": 1})
    # As they come from a sampler: float32.
    group = group_from_bytes(group_to_bytes(group_of(0)))
    again = group_from_bytes(group_to_bytes(group))
    (one, two), (other, another) = (batch([g], job) for g in (group, again))
    for left, right in [(one, other), (two, another)]:
        assert left.sampling_logprobs.tobytes() == right.sampling_logprobs.tobytes()
        assert left.token_ids.tobytes() == right.token_ids.tobytes()
        assert left.advantages.tobytes() == right.advantages.tobytes()


class Maker:
    """Makes groups, those in `equal` with equal rewards; a Recorder and a Teacher as well."""

    def __init__(self, *, equal=()):
        self.equal = set(equal)
        self.made: list[tuple[int, int, str]] = []
        self.kept: dict[int, bytes] = {}
        self.judged: list[tuple[int, int]] = []
        self.dies_at: tuple[int, int] | None = None

    async def group(self, number, source, task, attempt=0):
        assert source is SOURCE
        if (number, attempt) == self.dies_at:
            raise asyncio.CancelledError
        self.made.append((number, attempt, task.id))
        equal = (number, attempt) in self.equal
        return group_of(number, attempt=attempt, rewards=(1.0, 1.0 - (not equal)), task=task)

    async def keep(self, number, group):
        self.kept[number] = group

    async def logprobs(self, group):
        self.judged.append((group.number, group.attempt))
        return [[-0.5] * rollout.num_drawn for rollout in group.rollouts]


def supply(maker, *, replacements, teacher=None):
    return Supply(
        AlgorithmSpec(group_size=2, groups_per_step=2, max_group_replacements=replacements),
        {number: group_from_bytes(body) for number, body in maker.kept.items()},
        tasks=TaskOrder(TASKS, seed=11),
        maker=maker,
        teacher=teacher,
        recorder=maker,
        versions=Versions(before=range(0), continuing=False),
    )


@pytest.mark.parametrize(("replacements", "last"), [(0, 0), (1, 1), (2, 2), (3, 3), (5, 3)])
def test_a_group_with_equal_rewards_is_replaced_so_often_and_the_last_is_kept(replacements, last):
    maker = Maker(equal=[(7, 0), (7, 1), (7, 2)])
    group = simulate(supply(maker, replacements=replacements).group(7, SOURCE))
    assert group.attempt == last
    assert [attempt for _, attempt, _ in maker.made] == list(range(last + 1))
    tasks = [task for _, _, task in maker.made]
    assert len(set(tasks)) == len(tasks), "another task each time"
    assert bits(group_from_bytes(maker.kept[7])) == bits(group)


@pytest.mark.parametrize("dies_at", [0, 1, 2, 3])
def test_a_successor_goes_on_with_the_attempt_that_is_next(dies_at):
    whole = Maker(equal=[(7, 0), (7, 1), (7, 2)])
    simulate(supply(whole, replacements=5).group(7, SOURCE))
    maker = Maker(equal=whole.equal)
    maker.dies_at = (7, dies_at)
    with pytest.raises(asyncio.CancelledError):
        simulate(supply(maker, replacements=5).group(7, SOURCE))
    maker.dies_at = None
    successor = supply(maker, replacements=5)
    assert successor.take([7]) == successor.waiting() == []
    simulate(successor.group(7, SOURCE))
    assert maker.made == whole.made
    assert maker.kept == whole.kept


def test_what_is_finished_is_taken_once_and_needs_nobody():
    maker = Maker(equal=[(7, 0), (9, 0)])
    for number in (7, 8):
        simulate(supply(maker, replacements=1).group(number, SOURCE))
    simulate(supply(maker, replacements=0).group(9, SOURCE))
    made = list(maker.made)
    successor = supply(maker, replacements=1)
    assert [group.number for group in successor.waiting()] == [7, 8]
    taken = successor.take(range(10))
    assert [(group.number, group.attempt) for group in taken] == [(7, 1), (8, 0)]
    assert successor.take(range(10)) == []
    assert maker.made == made


def test_the_teacher_judges_a_group_once_and_none_that_is_replaced():
    maker = Maker(equal=[(7, 0)])
    group = simulate(supply(maker, replacements=1, teacher=maker).group(7, SOURCE))
    assert maker.judged == [(7, 1)]
    assert group.teacher_logprobs == [[-0.5, -0.5], [-0.5, -0.5]]
    (found,) = supply(maker, replacements=1, teacher=maker).take([7])
    assert found.teacher_logprobs == group.teacher_logprobs
    assert maker.judged == [(7, 1)]


def test_a_group_that_is_sampled_again_takes_the_place_of_what_was_kept():
    maker = Maker()
    supplied = supply(maker, replacements=0)
    first = simulate(supplied.group(7, SOURCE))
    maker.equal = {(7, 0)}
    again = simulate(supplied.again(first, SOURCE))
    assert maker.made[0] == maker.made[1]
    assert again.rewards == [1.0, 1.0]
    assert group_from_bytes(maker.kept[7]).rewards == [1.0, 1.0]


@given(st.integers(0, 1000), st.integers(0, 2**32))
def test_replacements_are_of_each_other_task_before_one_comes_again(number, seed):
    order = TaskOrder(TASKS, seed)
    first = order.choose(number, 0)
    others = [order.choose(number, attempt) for attempt in range(1, len(TASKS))]
    assert sorted(task.id for task in (first, *others)) == sorted(task.id for task in TASKS)
    assert order.choose(number, len(TASKS)) == others[0]


def test_the_only_task_there_is_replaces_itself():
    order = TaskOrder(TASKS[:1], seed=1)
    assert [order.choose(5, attempt) for attempt in range(3)] == [TASKS[0]] * 3
