"""Jobs that learn in other ways than GRPO, on a real mesh."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest
import pytest_asyncio

from rollmesh.client import Client
from rollmesh.job import EvaluationCompleted, StateChanged, StepCompleted, load_job_file

pytestmark = pytest.mark.asyncio(loop_scope="session")
JOBS = Path(__file__).resolve().parents[2] / "examples" / "jobs"
PROJECT = "projects/algorithms"


async def _ran(client, spec) -> tuple[str, list[StepCompleted], list[float]]:
    """The job's adapter, its steps and its evaluations' rewards, once it has succeeded."""
    job = await client.jobs.create(PROJECT, spec)
    events = [event.event async for event in client.jobs.watch(job.name)]
    assert isinstance(events[-1], StateChanged)
    assert events[-1].to_state == "SUCCEEDED", events[-1].reason
    steps = [event for event in events if isinstance(event, StepCompleted)]
    rewards = [event.reward_mean for event in events if isinstance(event, EvaluationCompleted)]
    return (await client.jobs.get(job.name)).adapter, steps, rewards


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def supervised(mesh):
    """The job of supervised fine-tuning among the examples has run."""
    async with Client(mesh.address) as client:
        return await _ran(client, load_job_file(JOBS / "sft.yaml"))


async def test_what_is_shown_is_learned(supervised):
    _, steps, rewards = supervised
    losses = [step.metrics["loss"] for step in steps]
    assert mean(losses[-3:]) < 0.5 * mean(losses[:2])
    assert len(rewards) == 3
    assert rewards[-1] > rewards[0] + 0.2, rewards
    # Nothing was sampled, so there is nothing to tell of it.
    assert not {"reward_mean", "kl_sampler", "truncated_fraction"} & steps[0].metrics.keys()


async def test_a_student_comes_close_to_its_teacher_without_any_reward(
    client, job_spec, supervised
):
    spec = job_spec(
        distillation={"teacher_adapter": supervised[0]},
        reward=None,
        evaluation=None,
        algorithm={"groups_per_step": 16, "group_size": 4, "advantage": "dr_grpo"},
        stop={"max_steps": 7},
    )
    _, steps, _ = await _ran(client, spec)
    apart = [step.metrics["kl_teacher"] for step in steps]
    assert apart[0] > 0
    assert mean(apart[-3:]) < 0.6 * mean(apart[:2]), apart
    assert "reward_mean" not in steps[0].metrics


@pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param(
            {"loss": "ppo", "clip_low_threshold": 0.8, "clip_high_threshold": 1.28}, id="dapo"
        ),
        pytest.param({"loss": "gspo", "advantage": "reinforce"}, id="gspo", marks=pytest.mark.long),
        pytest.param(
            {"loss": "stable_reinforce", "max_importance_ratio": 3}, id="stable_reinforce"
        ),
    ],
)
async def test_a_job_with_dynamic_sampling_learns_a_little_in_a_few_steps(
    client, job_spec, algorithm
):
    sizes = {"groups_per_step": 16, "group_size": 8, "max_group_replacements": 3}
    spec = job_spec(algorithm=sizes | algorithm, stop={"max_steps": 8}, evaluation=None)
    _, steps, _ = await _ran(client, spec)
    rewards = [step.metrics["reward_mean"] for step in steps]
    # Of those that are replaced nothing is trained on: what is left is neither always right nor
    # always wrong.
    assert sum(step.metrics["groups_replaced"] for step in steps) > 0
    assert mean(step.metrics["groups_with_equal_rewards"] for step in steps) < 4
    assert mean(rewards[-3:]) > mean(rewards[:2]), rewards
