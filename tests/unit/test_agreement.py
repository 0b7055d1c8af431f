"""What samplers and trainer make of the same tokens: measured, bounded, and acted upon."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import numpy as np
import pytest

from rollmesh.types import Completion, PolicySpan
from services.coordinator.agreement import gaps
from services.coordinator.groups import Rollout, Turn
from tests.fakes.job_mesh import Context, JobMesh, spec
from tests.fakes.virtual_time import simulate

SEEDS = range(10)


def rollout(logprobs, *spans, prompt=1):
    """Of one turn, with so many tokens of prompt."""
    completion = Completion(
        token_ids=tuple(range(len(logprobs))),
        logprobs=tuple(logprobs),
        spans=tuple(PolicySpan(count, version, "d", sampler) for count, version, sampler in spans),
        stop_reason="stop",
    )
    return Rollout([Turn(range(prompt), completion)])


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("drawn", "trainer", "expected"),
    [
        pytest.param(
            [rollout([-1, -2], (2, 5, "a"), prompt=3)],
            [[-9, -9, -1.5, -2.25]],
            {"a": [0.5, 0.25]},
            id="the completion is the last of its sequence",
        ),
        pytest.param(
            [
                Rollout(
                    [
                        rollout([-1], (1, 5, "a"), prompt=2).turns[0],
                        rollout([-2, -3], (2, 5, "b"), prompt=3).turns[0],
                    ]
                )
            ],
            [[-9, -2, -9, -9, -9, -4, -6]],
            {"a": [1], "b": [2, 3]},
            id="two turns, between which the environment spoke",
        ),
        pytest.param(
            [rollout([-1, -2, -3, -4], (1, 4, "a"), (2, 5, "a"), (1, 5, "b"), prompt=2)],
            [[-9, -1, -1, -1, -1]],
            {"a": [1, 2], "b": [3]},
            id="spans of an older version, of the same, of another sampler",
        ),
        pytest.param(
            [rollout([-1], (1, 5, "a")), rollout([-2, -1], (1, 5, "b"), (1, 5, "a"))],
            [[-2], [-4, -4]],
            {"a": [1, 3], "b": [2]},
            id="two rollouts",
        ),
        pytest.param([rollout([-1], (1, 4, "a"))], [[-7]], {}, id="nothing to compare"),
        pytest.param(
            [rollout([NAN, -INF, -1, -1, -INF], (5, 5, "a"))],
            [[-1, -1, NAN, -1, -INF]],
            {"a": [INF, INF, INF, 0, INF]},
            id="no numbers",
        ),
    ],
)
def test_gaps_are_those_of_the_tokens_that_the_version_drew_by_sampler(drawn, trainer, expected):
    found = gaps(drawn, [np.array(values, np.float32) for values in trainer], 5)
    assert {sampler: apart.tolist() for sampler, apart in found.items()} == expected


def mesh_with(seed=0, *, sampling=None, max_staleness=0, pieces=2, **values):
    algorithm = {"max_staleness": max_staleness, **values.pop("algorithm", {})}
    context = Context(spec(algorithm=algorithm, sampling=sampling or {}, **values))
    mesh = JobMesh(context, seed=seed)
    mesh.pieces = pieces
    return mesh


def trained(mesh, version):
    """The tokens trained at `version` that it drew itself."""
    return [
        token for token, at in mesh.trained_at.items() if at == mesh.sampled_from[token] == version
    ]


def test_every_step_tells_the_gap_of_what_it_was_trained_on():
    mesh = mesh_with(3)
    mesh.drift = {"s1": 0.125, "s2": -0.25}
    simulate(mesh.run())
    assert mesh.forwarded == []
    for step in mesh.context.steps:
        apart = [abs(mesh.drift[mesh.sampled_by[t]]) for t in trained(mesh, step.step - 1)]
        assert set(apart) == {0.125, 0.25}
        assert step.metrics["logprob_gap_max"] == 0.25
        assert step.metrics["logprob_gap_mean"] == pytest.approx(np.mean(apart), rel=1e-12)


def test_of_older_tokens_no_gap_is_told():
    mesh = mesh_with(1, max_staleness=1)
    mesh.drift = {"s1": 0.5}
    simulate(mesh.run())
    for step in mesh.context.steps:
        assert ("logprob_gap_max" in step.metrics) is bool(trained(mesh, step.step - 1))
    assert "logprob_gap_max" not in mesh.context.steps[-1].metrics


@pytest.mark.parametrize(
    ("sampling", "temperature"),
    [
        ({}, None),
        ({"temperature": 0.5}, None),
        ({"temperature": 0.5, "logprobs_kind": "policy", "top_k": 3}, None),
        ({"temperature": 0.5, "logprobs_kind": "sampled", "max_logprob_gap": 1e-9}, 0.5),
        ({"temperature": 2.0, "logprobs_kind": "sampled"}, 2.0),
    ],
)
def test_both_sides_are_of_one_kind_so_on_policy_ratios_are_one(sampling, temperature):
    mesh = mesh_with(2, sampling=sampling)
    simulate(mesh.run())
    assert {config.temperature for config in mesh.loss_configs} == {temperature}
    kind = sampling.get("logprobs_kind", "policy")
    assert {params.logprobs_kind for params in mesh.params} == {kind}
    for step in mesh.context.steps:
        assert step.metrics["ratio_max"] == 1.0
        assert step.metrics["logprob_gap_max"] == 0.0
    assert mesh.quarantined == {}


def groups_of(mesh):
    return len(mesh.context.steps) * 3


BOUND = {"max_logprob_gap": 0.01}


def check_that_nothing_of_a_drifting_sampler_was_trained(mesh, max_staleness):
    assert mesh.version == 6
    assert [event.step for event in mesh.context.steps] == [1, 2, 3, 4, 5, 6]
    assert not {mesh.sampled_by[token] for token in mesh.trained_at} & set(mesh.drift)
    # Twice trained tokens stop the fake; each group is drawn with its own seed, again too.
    assert len(set(mesh.seeds)) == groups_of(mesh)
    assert [len(data) for data in mesh.data] == [6] * 6
    assert max(mesh.staleness) <= max_staleness
    assert mesh.under_way == []


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_drifting_sampler_is_quarantined_and_its_groups_are_drawn_again(seed, max_staleness):
    mesh = mesh_with(seed, sampling=BOUND, max_staleness=max_staleness)
    mesh.drift = {"s1": 0.5}
    assert simulate(mesh.run()).kind == "finished"
    assert set(mesh.quarantined) == {"s1"}
    assert mesh.context.warnings == ["LOGPROB_GAP"]
    (warning,) = (event for event in mesh.context.events if event.kind == "warning")
    for message in (mesh.quarantined["s1"], warning.message):
        assert "version 0 of projects/p/adapters/j are up to 0.5 nats" in message
        assert "max_logprob_gap is 0.01" in message
    assert "sampler s1 is asked for nothing more by this job: " in warning.message
    assert mesh.num_ended == 1, "the quarantine outlives the loop"
    check_that_nothing_of_a_drifting_sampler_was_trained(mesh, max_staleness)
    again = len(mesh.seeds) - groups_of(mesh)
    assert again > 0
    for step in mesh.context.steps:
        assert step.metrics.get("logprob_gap_max", 0.0) == 0.0


def drifting_from(mesh, version, **drift):
    """A sampler that begins to drift in the middle of the job."""

    async def run():
        async with asyncio.TaskGroup() as tasks:
            job = tasks.create_task(mesh.run())
            while mesh.version < version:
                await asyncio.sleep(0.05)
            mesh.drift = drift
            return await job

    return run()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sampler_that_begins_to_drift_later_is_found_then(seed):
    mesh = mesh_with(seed, sampling=BOUND, pieces=1)
    assert simulate(drifting_from(mesh, 3, s2=math.nan)).kind == "finished"
    assert set(mesh.quarantined) == {"s2"}
    assert "version 3" in mesh.quarantined["s2"]
    assert "up to inf nats" in mesh.quarantined["s2"]
    by_s2 = {mesh.trained_at[t] for t in mesh.trained_at if mesh.sampled_by[t] == "s2"}
    assert max(by_s2) < 3
    # One look a step, and one more at what was drawn again.
    assert [version for version, _ in mesh.forwarded] == [0, 1, 2, 3, 3, 4, 5]
    again = mesh.forwarded[4][1]
    assert again == 2 * (len(mesh.seeds) - groups_of(mesh))


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_that_are_early_show_a_drift_that_those_of_the_step_are_too_old_to_show(seed):
    mesh = mesh_with(seed, sampling=BOUND, max_staleness=1)
    # What a step starts is there before its optimizer step.
    mesh.slowness = {"score": 0.01, "sample": 0.01, "forward_backward": 30.0}
    mesh.piece_s = 0.01
    simulate(drifting_from(mesh, 2, s1=0.5))
    assert set(mesh.quarantined) == {"s1"}
    assert min(mesh.staleness[-12:]) == 1
    drifted = [token for token in mesh.trained_at if mesh.sampled_by[token] == "s1"]
    assert max(mesh.sampled_from[token] for token in drifted) < 2
    assert max(mesh.staleness) <= 1


def test_within_the_bound_nothing_is_drawn_again():
    mesh = mesh_with(5, sampling=BOUND)
    mesh.drift = {"s1": 0.009, "s2": -0.009}
    simulate(mesh.run())
    assert mesh.quarantined == {}
    assert mesh.context.warnings == []
    assert len(mesh.seeds) == groups_of(mesh)
    assert mesh.forwarded == [(version, 6) for version in range(6)]
    assert "agreement" in mesh.context.steps[0].phases


def test_when_all_samplers_drift_the_job_waits_for_another():
    mesh = mesh_with(6, sampling=BOUND)
    mesh.drift = {"s1": 0.5, "s2": 0.5}

    async def run():
        async with asyncio.TaskGroup() as tasks:
            job = tasks.create_task(mesh.run())
            await asyncio.sleep(1000)
            assert set(mesh.quarantined) == {"s1", "s2"}
            assert (mesh.version, mesh.data) == (0, [])
            assert mesh.context.warnings == ["LOGPROB_GAP", "LOGPROB_GAP", "SAMPLER_UNAVAILABLE"]
            mesh.samplers.append("s3")
            return await job

    assert simulate(run()).kind == "finished"
    assert {mesh.sampled_by[token] for token in mesh.trained_at} == {"s3"}
    check_that_nothing_of_a_drifting_sampler_was_trained(mesh, 0)


@pytest.mark.parametrize("seed", range(4))
def test_one_sampler_after_another_that_drifts_is_found_in_one_step(seed):
    mesh = mesh_with(seed, sampling=BOUND, pieces=1)
    mesh.samplers = ["s1"]
    mesh.drift = {"s1": 0.5, "s2": 0.5, "s3": 0.5}
    quarantine = mesh.quarantine

    def and_start_the_next(job, sampler, reason):
        quarantine(job, sampler, reason)
        mesh.samplers.append(f"s{len(mesh.samplers) + 1}")

    mesh.quarantine = and_start_the_next
    assert simulate(mesh.run()).kind == "finished"
    assert list(mesh.quarantined) == ["s1", "s2", "s3"]
    assert [version for version, _ in mesh.forwarded] == [0, 0, 0, 0, 1, 2, 3, 4, 5]
    check_that_nothing_of_a_drifting_sampler_was_trained(mesh, 0)


def test_rollouts_that_teach_nothing_are_not_looked_at():
    mesh = mesh_with(7, sampling=BOUND)
    looked_at = []
    score_each = mesh.score_each

    async def second_group_all_the_same(function, parameters, items, *, judge):
        scores = await score_each(function, parameters, items, judge=judge)
        if items[0].reference != "1":
            return scores
        return [replace(score, reward=1.0) for score in scores]

    mesh.score_each = second_group_all_the_same
    simulate(mesh.run())
    looked_at = [count for _, count in mesh.forwarded]
    assert looked_at == [len(data) for data in mesh.data]
    assert set(looked_at) == {4, 6}
