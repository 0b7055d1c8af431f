"""Rewards that are made up of several, and asked of a judge, on a real mesh."""

from __future__ import annotations

import pytest

from rollmesh.errors import NotFound
from rollmesh.job import StateChanged, StepCompleted

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROJECT = "projects/judged"


async def tokens_of(client) -> int:
    schedule = await client.fleet.explain(PROJECT)
    return next(quota.used for quota in schedule.quotas if quota.name == "tokens_per_day")


async def test_a_judge_on_the_fleet_is_asked_under_the_jobs_own_project(client, job_spec):
    judge = {
        "rubric": "{completion}?",
        "template": "{rubric}",
        "max_tokens": 3,
        # The tiny model says numbers, and never a score.
        "when_unclear": 0.25,
    }
    spec = job_spec(
        reward={
            "function": "weighted",
            "parameters": {
                "parts": [
                    {"function": "exact_match", "weight": 0.5},
                    {"function": "llm_judge", "weight": 0.5, "parameters": judge},
                ]
            },
        },
        algorithm={"groups_per_step": 4, "group_size": 4},
        stop={"max_steps": 2},
        evaluation=None,
    )
    job = await client.jobs.create(PROJECT, spec)
    events = [event.event async for event in client.jobs.watch(job.name)]
    assert isinstance(events[-1], StateChanged)
    assert events[-1].to_state == "SUCCEEDED", events[-1].reason
    steps = [event for event in events if isinstance(event, StepCompleted)]
    for step in steps:
        metrics = step.metrics
        assert metrics["reward.llm_judge"] == pytest.approx(0.25)
        expected = 0.5 * metrics["reward.exact_match"] + 0.5 * 0.25
        assert metrics["reward_mean"] == pytest.approx(expected)
    drawn = sum(step.metrics["num_tokens"] for step in steps)
    # Of each of the 32 completions the judge said at least a token.
    assert await tokens_of(client) >= drawn + 32


async def test_a_judge_that_is_not_there_is_refused_when_the_job_is_created(client, job_spec):
    for who, field in [
        ({"base_model": "none"}, "base_model"),
        ({"adapter": "projects/judged/adapters/none"}, "adapters/none"),
        ({"adapter": "projects/other/adapters/secret"}, "there is no"),
    ]:
        reward = {"function": "llm_judge", "parameters": {"rubric": "x", **who}}
        with pytest.raises(NotFound, match=field):
            await client.jobs.create(PROJECT, job_spec(reward=reward))
