"""Jobs of supervised fine-tuning, and the losses of all jobs."""

from __future__ import annotations

import asyncio

import pytest

from rollmesh import types
from rollmesh.errors import InvalidRequest
from services.coordinator import supervised
from services.coordinator.datasets import Task
from services.coordinator.learner import loss_of
from services.coordinator.supervised import check_lengths
from tests.fakes.job_mesh import TASKS, Context, JobMesh, Letters, held_out, spec
from tests.fakes.virtual_time import simulate


def job(**values):
    return spec(sft={"completion": "<{answer}>"}, **values)


def texts(mesh):
    return [
        [Letters().decode([*datum.token_ids, datum.target_token_ids[-1]]) for datum in data]
        for data in mesh.data
    ]


def test_every_task_is_shown_once_an_epoch_and_nothing_is_sampled():
    mesh = JobMesh(Context(job(stop={"max_steps": 7})))
    assert simulate(mesh.run()).kind == "finished"
    shown = [text for step in texts(mesh) for text in step]
    every = sorted(f"q{task.fields['answer']}=<{task.fields['answer']}>." for task in TASKS)
    assert [sorted(shown[first : first + 7]) for first in (0, 7, 14)] == [every] * 3
    assert mesh.seeds == []
    assert mesh.loss_configs == [types.LossConfig("cross_entropy")] * 7


def test_the_loss_is_the_mean_over_the_completions_tokens():
    mesh = JobMesh(Context(job()))
    simulate(mesh.run())
    for data in mesh.data:
        # "<n>." is 4 tokens, in each of 3 groups.
        assert {len(datum.weights[datum.weights > 0]) for datum in data} == {4}
        assert sum(float(datum.weights.sum()) for datum in data) == pytest.approx(1.0)
        assert {datum.advantages for datum in data} == {None}


def test_it_tells_what_makes_sense_of_it():
    mesh = JobMesh(Context(job()))
    simulate(mesh.run())
    told = mesh.context.steps[0].metrics
    assert {"loss", "grad_norm", "num_tokens", "num_rollouts", "tokens_per_s"} <= told.keys()
    assert not {"reward_mean", "truncated_fraction", "logprob_gap_max"} & told.keys()
    assert (told["num_tokens"], told["completion_tokens_mean"]) == (12, 4)


def test_an_evaluation_samples_greedily():
    mesh = JobMesh(Context(job(evaluation=held_out(every_steps=3))))
    simulate(mesh.run())
    assert mesh.context.evaluated_at == [0, 3, 6]
    assert {version for version, _ in mesh.evaluation_prompts} == {0, 3, 6}


@pytest.mark.parametrize("evaluated", [False, True])
def test_its_versions_are_live_on_the_samplers_only_if_they_are_evaluated(evaluated):
    mesh = JobMesh(Context(job(**({"evaluation": held_out()} if evaluated else {}))))
    loaded = []
    load = mesh.load

    async def counted(base_model, source):
        loaded.append(source.policy_version)
        await load(base_model, source)

    mesh.load = counted
    assert simulate(mesh.run()).kind == "finished"
    assert loaded == (list(range(7)) if evaluated else [])


def test_it_needs_no_reward():
    mesh = JobMesh(Context(job(reward=None)))
    assert simulate(mesh.run()).kind == "finished"


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("seed", range(10))
def test_a_job_whose_loop_dies_again_and_again_is_shown_the_same(max_staleness, seed):
    steps = {"algorithm": {"max_staleness": max_staleness}}
    whole = JobMesh(Context(job(**steps)))
    simulate(whole.run())

    async def lives():
        for _ in range(1000):
            try:
                async with asyncio.timeout(mesh.rng.uniform(0, 12)):
                    return await mesh.run()
            except TimeoutError:
                pass
        raise AssertionError("the job makes no progress")

    mesh = JobMesh(Context(job(**steps)), seed=seed)
    assert simulate(lives()).kind == "finished"
    assert texts(mesh) == texts(whole)


def test_what_a_trainer_cannot_read_is_named():
    # "q0=" and "<0>.": of 7 tokens 6 are read.
    check_lengths(job(), TASKS, Letters(), max_length=6)
    check_lengths(job(), TASKS, Letters(), max_length=None)
    with pytest.raises(
        InvalidRequest, match=r"task 't0' has 3 tokens .* take 6 together"
    ) as caught:
        check_lengths(job(), TASKS, Letters(), max_length=5)
    assert caught.value.context["field"] == "sft.completion"


def test_of_more_tasks_than_can_be_looked_at_the_longest_are(monkeypatch):
    monkeypatch.setattr(supervised, "MAX_CHECKED", 1)
    long = Task(id="long", fields={"question": "q" * 90, "answer": "1"})
    with pytest.raises(InvalidRequest, match="task 'long' has 91 tokens"):
        check_lengths(job(), [*TASKS, long, *TASKS], Letters(), max_length=50)


@pytest.mark.parametrize(
    ("algorithm", "sampling", "expected"),
    [
        ({}, {}, types.LossConfig("importance_sampling")),
        (
            {"loss": "ppo", "clip_low_threshold": 0.8, "clip_high_threshold": 1.28},
            {},
            types.LossConfig("ppo", clip_low_threshold=0.8, clip_high_threshold=1.28),
        ),
        (
            {"loss": "gspo", "max_importance_ratio": 2.0, "kl_coefficient": 0.1},
            {},
            types.LossConfig("gspo", max_importance_ratio=2.0, kl_coefficient=0.1),
        ),
        (
            {"loss": "cispo"},
            {"logprobs_kind": "sampled", "temperature": 0.5},
            types.LossConfig("cispo", temperature=0.5),
        ),
    ],
)
def test_the_trainer_gets_the_loss_of_the_spec(algorithm, sampling, expected):
    assert loss_of(spec(algorithm=algorithm, sampling=sampling)) == expected
