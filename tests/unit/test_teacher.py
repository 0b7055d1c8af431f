"""On-policy distillation: who judges, for how long, and what is trained on it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from rollmesh.errors import FailedPrecondition, InvalidRequest
from rollmesh.types import AdapterSource
from tests.fakes.job_mesh import POLICY_LOGPROB, TEACHER, Context, JobMesh, spec
from tests.fakes.virtual_time import simulate

KNOWN = {"teacher": {"base_model": "tiny", "policy_version": 7, "digest": "taught"}}
"""What the store gives a job along that has an adapter as its teacher."""


def job(*, reward=None, algorithm=None, **distillation):
    return spec(
        distillation=distillation, reward=reward, algorithm=algorithm, stop={"max_steps": 3}
    )


@pytest.mark.parametrize(
    ("distillation", "judge"),
    [
        pytest.param({}, ("tiny", None), id="the base model"),
        pytest.param({"teacher_base_model": "big"}, ("big", None), id="another base model"),
        pytest.param(
            {"teacher_adapter": TEACHER},
            ("tiny", AdapterSource(TEACHER, 7, "taught", "trainer")),
            id="the newest version",
        ),
        pytest.param(
            {"teacher_adapter": TEACHER, "teacher_version": 7},
            ("tiny", AdapterSource(TEACHER, 7, "taught", "trainer")),
            id="a version",
        ),
    ],
)
def test_every_rollout_is_judged_once_by_the_teacher(distillation, judge):
    mesh = JobMesh(Context(job(**distillation), memory=dict(KNOWN)))
    assert simulate(mesh.run()).kind == "finished"
    # Steps, groups, rollouts.
    assert mesh.teacher.judged == [judge] * 3 * 3 * 2


def test_tokens_are_pushed_towards_what_the_teacher_finds_likelier():
    mesh = JobMesh(Context(job(coefficient=3.0)))
    mesh.teacher.logprob = lambda token: -0.001 * (token % 1000)
    simulate(mesh.run())
    for datum in (datum for data in mesh.data for datum in data):
        counts = datum.weights > 0
        of_teacher = -0.001 * (datum.target_token_ids[counts] % 1000)
        expected = 3.0 * (of_teacher - POLICY_LOGPROB)
        assert datum.advantages[counts] == pytest.approx(expected, abs=1e-5)
        assert not datum.advantages[~counts].any()


def test_a_job_without_a_reward_tells_how_far_the_teacher_is_and_nothing_of_rewards():
    mesh = JobMesh(Context(job()))
    simulate(mesh.run())
    told = mesh.context.steps[0].metrics
    assert told["kl_teacher"] == pytest.approx(POLICY_LOGPROB + 0.25)
    assert not {"reward_mean", "reward_std", "groups_with_equal_rewards"} & told.keys()
    assert told["num_rollouts"] == 6


def test_with_a_reward_both_count():
    reward = {"function": "exact", "reference": "{answer}"}
    mesh = JobMesh(Context(job(reward=reward, algorithm={"advantage": "dr_grpo"})))
    simulate(mesh.run())
    # Rewards 0 and 1 of each group, and the teacher finds each token e^0.25 times likelier.
    each = {round(float(datum.advantages[-1]), 5) for datum in mesh.data[0]}
    assert each == {-0.5 + 0.25, 0.5 + 0.25}
    assert mesh.context.steps[0].metrics["reward_mean"] == 0.5


@pytest.mark.parametrize("ends", [4, 5], ids=["by length", "by its last token"])
def test_a_completion_that_fills_the_context_is_judged_but_for_its_last_token(ends):
    mesh = JobMesh(Context(job()))
    mesh.length = lambda: ends  # With "length" at 4, else with "stop".
    mesh.teacher.max_length = len("q0=") + ends - 1
    simulate(mesh.run())
    last = [datum.advantages[-ends:].tolist() for data in mesh.data for datum in data]
    assert last == [[*[0.25] * (ends - 1), 0.0]] * 18


def test_a_completion_that_is_longer_than_the_teachers_context_fails_the_job():
    mesh = JobMesh(Context(job()))
    mesh.length = lambda: 4
    mesh.teacher.max_length = len("q0=") + 2
    with pytest.raises(InvalidRequest, match="too long"):
        simulate(mesh.run())


def test_the_version_is_the_same_in_all_lives_of_a_job_though_newer_ones_are_published():
    mesh = JobMesh(Context(job(teacher_adapter=TEACHER), memory=dict(KNOWN)), seed=5)

    async def lives():
        for _ in range(1000):
            try:
                async with asyncio.timeout(mesh.rng.uniform(0, 20)):
                    return await mesh.run()
            except TimeoutError:
                mesh.teacher.versions[8] = "newer"
        raise AssertionError("the job makes no progress")

    assert simulate(lives()).kind == "finished"
    assert {source.policy_version for _, source in mesh.teacher.judged} == {7}
    assert mesh.context.memory["teacher"] == KNOWN["teacher"]


@pytest.mark.parametrize(
    ("versions", "says"),
    [({}, "not there any more"), ({7: "other"}, "was deleted and made anew")],
)
def test_a_teacher_that_was_deleted_fails_the_job_by_its_key(versions, says):
    context = Context(job(teacher_adapter=TEACHER), memory=dict(KNOWN), pause_after=1)
    mesh = JobMesh(context)
    assert simulate(mesh.run()).kind == "paused"
    mesh.teacher.versions = versions
    context.pause_after = None
    judged = len(mesh.teacher.judged)
    with pytest.raises(
        FailedPrecondition, match=rf"distillation\.teacher_adapter: .*version 7, .*{says}"
    ):
        simulate(mesh.run())
    assert len(mesh.teacher.judged) == judged


@pytest.mark.parametrize("seed", range(3))
def test_a_lost_sampler_costs_the_teacher_time_alone(seed):
    mesh = JobMesh(Context(job()), seed=seed)
    mesh.sampler_losses = 0.3
    assert simulate(mesh.run()).kind == "finished"
    assert set(mesh.context.warnings) == {"SAMPLER_UNAVAILABLE"}
    assert all(np.isfinite(datum.advantages).all() for data in mesh.data for datum in data)
