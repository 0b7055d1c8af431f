"""What is done between two steps of a job, also when its loop is killed in the middle of it."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from rollmesh.errors import Unimplemented
from rollmesh.job import EvaluationCompleted, Warned
from rollmesh.names import checkpoint_name
from services.coordinator.datasets import Task
from services.coordinator.store import Request, derived_request_id
from tests.fakes.job_mesh import ADAPTER, Context, JobMesh, held_out, spec
from tests.fakes.virtual_time import simulate

RISING_THEN_FLAT = {0: 0.2, 2: 0.5, 4: 0.5, 6: 0.4, 8: 0.9}


def context_of(*, stop, evaluation):
    return Context(spec(stop=stop, evaluation=held_out(every_steps=2, **evaluation)))


def mesh_of(context, rewards=RISING_THEN_FLAT, **settings):
    mesh = JobMesh(context, **settings)
    mesh.evaluation_rewards = dict(rewards)
    return mesh


def with_sets(names):
    return [
        {"name": name, "dataset": {"tasks": [{"fields": {"question": name}}]}} for name in names
    ]


@pytest.mark.parametrize(
    ("stop", "steps"),
    [
        pytest.param({"patience": 1}, 4, id="the first that is no better"),
        pytest.param({"patience": 2}, 6, id="two in a row"),
        pytest.param({"patience": 3}, 10, id="a better one in between begins anew"),
        pytest.param({"patience": 2, "min_improvement": 0.35}, 4, id="better, but not by enough"),
    ],
)
def test_a_job_ends_when_so_many_evaluations_in_a_row_were_no_better(stop, steps):
    context = context_of(stop={"max_steps": 10, **stop}, evaluation={})
    outcome = simulate(mesh_of(context).run())
    assert (outcome.kind, context.step) == ("finished", steps)
    assert ("stop.patience" in outcome.reason) == (steps < 10)


def test_the_weights_of_the_best_evaluation_are_kept_and_no_others():
    context = context_of(stop={"max_steps": 8}, evaluation={"keep_best": True})
    mesh = mesh_of(context)
    most = []
    create = mesh.create_checkpoint

    async def counted(name, **arguments):
        await create(name, **arguments)
        most.append(len(mesh.checkpoints))

    mesh.create_checkpoint = counted
    simulate(mesh.run())
    assert mesh.checkpoints == {f"{ADAPTER}/checkpoints/best-8": 8}
    assert max(most) == 2  # the one before goes once the new one is there
    assert context.memory["border"]["checkpoint"] == f"{ADAPTER}/checkpoints/best-8"
    assert (context.best_evaluation.step, context.best_evaluation.reward_mean) == (8, 0.9)


def failing(mesh, fails):
    """`mesh` makes no checkpoint where `fails` says so of its name."""
    create = mesh.create_checkpoint

    async def only_others(name, **arguments):
        if fails(name):
            raise Unimplemented("no room")
        await create(name, **arguments)

    mesh.create_checkpoint = only_others
    return mesh


def test_weights_that_cannot_be_kept_are_a_warning_and_no_others_are_told_as_the_best():
    context = context_of(stop={"max_steps": 8}, evaluation={"keep_best": True})
    mesh = failing(mesh_of(context), lambda name: name.endswith("best-2"))
    told = {}
    record = mesh.record

    async def noted(happening, *, memory=None):
        await record(happening, memory=memory)
        if isinstance(happening, EvaluationCompleted):
            told[happening.step] = memory["border"]["checkpoint"], set(mesh.checkpoints)

    mesh.record = noted
    assert simulate(mesh.run()).kind == "finished"
    assert context.warnings == ["CHECKPOINT_FAILED"]
    before, last = (f"{ADAPTER}/checkpoints/best-{step}" for step in (0, 8))
    assert [told[step] for step in (0, 2, 4)] == [(before, {before}), *[("", {before})] * 2]
    assert (told[8][0], mesh.checkpoints) == (last, {last: 8})


def test_names_may_be_as_long_as_they_can_be():
    job, adapter = (
        f"projects/{'p' * 63}/jobs/{'j' * 63}",
        f"projects/{'p' * 63}/adapters/{'a' * 63}",
    )
    longest, other = [
        derived_request_id(job, what, checkpoint_name(adapter, "best-1")) for what in ("a", "b")
    ]
    assert longest != other
    assert Request.of("p" * 63, longest, "CreateCheckpoint", "x").id == longest
    context = context_of(stop={"max_steps": 2}, evaluation={"keep_best": True})
    mesh = mesh_of(context)
    mesh.checkpoint_requests = Requests()
    assert simulate(mesh.run()).kind == "finished"
    assert len(mesh.checkpoint_requests) == 3
    assert {len(each) for each in mesh.checkpoint_requests} == {len(longest)}


class Requests(set):
    """Of the store: it refuses ids that are too long."""

    def add(self, request_id):
        super().add(Request.of("p", request_id, "any").id)


def test_weights_that_could_not_be_kept_are_kept_as_long_as_the_adapter_has_them():
    context = context_of(stop={"max_steps": 4}, evaluation={"keep_best": True})
    context.hold_step = 2
    mesh = failing(mesh_of(context), lambda name: context.hold_step and name.endswith("best-2"))
    assert simulate(mesh.run()).kind == "held"
    assert context.memory["border"]["checkpoint"] == ""
    context.hold_step = None
    assert simulate(mesh.run()).kind == "finished"
    assert mesh.checkpoints == {f"{ADAPTER}/checkpoints/best-2": 2}
    assert context.memory["border"]["checkpoint"] == f"{ADAPTER}/checkpoints/best-2"
    told = [event.message for event in context.events if isinstance(event, Warned)]
    assert [text for text in told if "are kept after all" in text] == told[1:]


def test_weights_that_were_kept_by_a_loop_which_died_go_if_the_next_finds_them_no_better():
    context = context_of(stop={"max_steps": 4}, evaluation={"keep_best": True})
    mesh = mesh_of(context)
    create = mesh.create_checkpoint

    async def dies(name, **arguments):
        await create(name, **arguments)
        if name.endswith("best-2"):
            raise asyncio.CancelledError

    mesh.create_checkpoint = dies
    with pytest.raises(asyncio.CancelledError):
        simulate(mesh.run())
    assert len(mesh.checkpoints) == 2
    mesh.evaluation_rewards = {0: 0.2, 2: 0.1, 4: 0.1}
    assert simulate(mesh.run()).kind == "finished"
    assert mesh.checkpoints == {f"{ADAPTER}/checkpoints/best-0": 0}
    assert not context.warnings


def test_every_set_is_evaluated_at_the_same_steps_and_the_main_one_decides():
    context = context_of(
        stop={"max_steps": 8, "evaluation_reward": 0.5}, evaluation={"sets": with_sets(["a", "b"])}
    )
    mesh = mesh_of(context)
    mesh.evaluation_sets = {
        name: [Task(id=name, fields={"question": name, "answer": "1"})] for name in ("a", "b")
    }
    outcome = simulate(mesh.run())
    assert "stop.evaluation_reward" in outcome.reason
    told = {(event.set, event.step): event.num_tasks for event in context.evaluations}
    assert told == {
        **{("", step): 5 for step in (0, 2)},
        **{(name, step): 1 for name in ("a", "b") for step in (0, 2)},
    }


def test_a_held_job_waits_at_its_step_and_goes_on_when_it_may():
    context = context_of(stop={"max_steps": 6}, evaluation={})
    context.hold_step = 2
    mesh = mesh_of(context)
    outcome = simulate(mesh.run())
    assert (outcome.kind, context.step, context.evaluated_at) == ("held", 2, [0, 2])
    assert simulate(mesh.run()).kind == "held"  # resumed too early: it trains nothing
    assert (context.step, mesh.version) == (2, 2)
    context.hold_step = None
    assert simulate(mesh.run()).kind == "finished"
    assert context.evaluated_at == [0, 2, 4, 6]


@pytest.mark.parametrize("seed", range(30))
def test_a_job_that_is_killed_decides_as_if_it_had_not_been(seed):
    context = context_of(
        stop={"max_steps": 10, "patience": 2},
        evaluation={"keep_best": True, "sets": with_sets(["a"])},
    )
    mesh = mesh_of(context, seed=seed)
    mesh.evaluation_sets = {"a": [Task(id="a", fields={"question": "a", "answer": "1"})]}
    rng = random.Random(seed)

    async def killed_again_and_again():
        for kills in range(1000):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.expovariate(1 / 8) * (1 + kills / 20)):
                    return await mesh.run()
        raise AssertionError("it never ended")

    outcome = simulate(killed_again_and_again())
    assert "2 evaluations in a row were no better than 0.5 after step 2" in outcome.reason
    assert (context.step, mesh.checkpoints) == (6, {f"{ADAPTER}/checkpoints/best-2": 2})
    told = [
        (event.step, event.set)
        for event in context.events
        if isinstance(event, EvaluationCompleted)
    ]
    assert sorted(told) == sorted({(step, name) for step in (0, 2, 4, 6) for name in ("", "a")})
