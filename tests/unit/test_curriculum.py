"""The curriculum: who is drawn first, and that a successor draws the same."""

from __future__ import annotations

import asyncio
import json

import pytest

from services.coordinator.curriculum import Curriculum
from services.coordinator.datasets import Task
from services.coordinator.groups import Group, Rollout
from tests.fakes.job_mesh import TASKS, Context, JobMesh, held_out, spec
from tests.fakes.virtual_time import simulate


def job(*, groups_per_step=2, seed=0, **curriculum):
    bounds = {"min_reward": 0.25, "max_reward": 0.75}
    return spec(
        curriculum={**bounds, **curriculum},
        algorithm={"groups_per_step": groups_per_step},
        seed=seed,
    )


def group_of(task, reward, number=0):
    return Group(number, 0, task, [Rollout([], reward)] * 2, 0.0, 0.0)


def drawn(source, numbers):
    return [source.choose(number, 0).id for number in numbers]


def trained(source, rewards, *, steps):
    """Ids of the tasks of each step; `rewards` by task id."""
    found = []
    for step in range(steps):
        tasks = [source.choose(2 * step + place, 0) for place in range(2)]
        source.observe([group_of(task, rewards[task.id]) for task in tasks])
        found.append([task.id for task in tasks])
    return found


def test_every_task_is_drawn_before_one_outside_of_the_bounds_comes_again():
    source = Curriculum(job(revisit=1e-9), TASKS[:6], step=0, memory={})
    found = trained(source, {task.id: 0.0 for task in TASKS}, steps=3)
    assert sorted(id_ for step in found for id_ in step) == [task.id for task in TASKS[:6]]


def test_then_what_lies_within_the_bounds_is_drawn_and_the_bounds_belong_to_it():
    source = Curriculum(job(revisit=1e-9), TASKS[:6], step=0, memory={})
    rewards = {"t0": 0.0, "t1": 0.24, "t2": 0.25, "t3": 0.75, "t4": 0.76, "t5": 1.0}
    found = trained(source, rewards, steps=40)
    # Until all have been seen those within are drawn again beside the new ones.
    seen = next(n for n in range(40) if len({id_ for step in found[:n] for id_ in step}) == 6)
    assert {id_ for step in found[seen:] for id_ in step} == {"t2", "t3"}


def test_a_task_that_is_learned_leaves_and_one_that_is_forgotten_comes_back():
    source = Curriculum(job(revisit=1e-9), TASKS[:2], step=0, memory={})
    both = [TASKS[0], TASKS[1]]
    source.observe([group_of(task, 0.5) for task in both])
    assert set(drawn(source, [2, 3])) == {"t0", "t1"}
    source.observe([group_of(TASKS[0], 1.0), group_of(TASKS[1], 0.5)])
    assert drawn(source, [4, 5]) == ["t1", "t0"]  # while t1 is under way, rather t0 than none
    source.observe([group_of(TASKS[0], 0.5), group_of(TASKS[1], 1.0)])
    assert drawn(source, [6]) == ["t0"]


def test_a_share_of_the_groups_goes_outside():
    tasks = [Task(id=f"x{n}", fields={}) for n in range(100)]
    source = Curriculum(job(revisit=0.3, groups_per_step=100), tasks, step=0, memory={})
    source.observe([group_of(task, 0.0 if n < 50 else 0.5) for n, task in enumerate(tasks)])
    outside = 0
    for step in range(1, 31):
        chosen = drawn(source, range(100 * step, 100 * step + 20))
        outside += sum(int(id_[1:]) < 50 for id_ in chosen)
        source.observe([])
    # 600 draws at 0.3: 180, and the standard deviation is 11.
    assert 130 < outside < 230


def test_groups_under_way_have_tasks_of_their_own():
    source = Curriculum(job(groups_per_step=7), TASKS, step=0, memory={})
    assert len(set(drawn(source, range(7)))) == 7


def test_replacements_are_of_other_tasks_than_the_group_had():
    source = Curriculum(job(), TASKS, step=0, memory={})
    attempts = [source.choose(0, attempt).id for attempt in range(7)]
    assert len(set(attempts)) == 7
    assert [source.choose(0, attempt).id for attempt in range(7)] == attempts


def test_equal_tasks_are_one():
    source = Curriculum(job(revisit=1e-9), [TASKS[0]] * 5 + [TASKS[1]], step=0, memory={})
    source.observe([group_of(TASKS[0], 0.0), group_of(TASKS[1], 0.5)])
    assert drawn(source, [2]) == ["t1"]


def test_another_seed_draws_in_another_order():
    orders = {
        tuple(drawn(Curriculum(job(seed=seed), TASKS, step=0, memory={}), range(6)))
        for seed in range(5)
    }
    assert len(orders) == 5


@pytest.mark.parametrize("lost", range(6))
def test_a_successor_draws_the_same_whatever_it_asks_for_first(lost):
    """Of what was drawn since the last event it knows only what that event told."""
    source = Curriculum(job(), TASKS, step=0, memory={})
    rewards = {task.id: index / 6 for index, task in enumerate(TASKS)}
    trained(source, rewards, steps=3)
    memory = json.loads(json.dumps(source.memory))
    expected = [source.choose(number, attempt).id for number in range(6, 12) for attempt in (0, 1)]
    heir = Curriculum(job(), TASKS, step=3, memory=memory)
    heir.choose(6 + lost, 1)
    assert [heir.choose(number, attempt).id for number in range(6, 12) for attempt in (0, 1)] == (
        expected
    )


def test_what_is_remembered_of_a_hundred_thousand_tasks_is_bounded():
    tasks = [Task(id=f"x{n}", fields={}) for n in range(100_000)]
    source = Curriculum(job(), tasks, step=0, memory={})
    source.observe([group_of(task, n % 9 / 8) for n, task in enumerate(tasks)])
    memory = json.dumps(source.memory)
    assert len(memory) < 1_100_000
    heir = Curriculum(job(), tasks, step=1, memory=json.loads(memory))
    assert drawn(heir, range(2, 22)) == drawn(source, range(2, 22))


class ByTask(JobMesh):
    """Rewards that tell tasks apart: t0 to t6 are of means 0 to 1."""

    async def score(self, function, parameters, items):
        async with self._call("score"):
            return [int(item.reference) / 6 for item in items]


def curriculum_job(max_staleness):
    return spec(
        curriculum={"min_reward": 0.3, "max_reward": 0.7, "revisit": 0.25},
        algorithm={"max_staleness": max_staleness},
        stop={"max_steps": 8},
        evaluation=held_out(every_steps=3),
    )


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("seed", range(10))
def test_a_job_whose_loop_dies_again_and_again_trains_on_the_tasks_that_it_would_have(
    max_staleness, seed
):
    whole = ByTask(Context(curriculum_job(max_staleness)), seed=seed)
    simulate(whole.run())

    async def lives():
        for _ in range(1000):
            try:
                async with asyncio.timeout(mesh.rng.uniform(0, 25)):
                    return await mesh.run()
            except TimeoutError:
                pass
        raise AssertionError("the job makes no progress")

    mesh = ByTask(Context(curriculum_job(max_staleness)), seed=seed + 100)
    assert simulate(lives()).kind == "finished"
    prompts = [[_prompts(data) for data in each.data] for each in (mesh, whole)]
    assert prompts[0] == prompts[1]


def _prompts(data):
    return ["".join(map(chr, datum.token_ids[:3])) for datum in data]
