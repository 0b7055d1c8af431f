"""What a job does with the sampling side, on a real mesh: both sides of its ratios agree."""

from __future__ import annotations

import pytest

from rollmesh.job import StateChanged, StepCompleted, Warned

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROJECT = "projects/test"


async def _run(client, spec):
    """The metrics of each step of a job that succeeds, and its warnings."""
    job = await client.jobs.create(PROJECT, spec)
    happenings = [event.event async for event in client.jobs.watch(job.name)]
    assert isinstance(happenings[-1], StateChanged)
    assert happenings[-1].to_state == "SUCCEEDED", happenings[-1].reason
    steps = [each.metrics for each in happenings if isinstance(each, StepCompleted)]
    return steps, [each.reason for each in happenings if isinstance(each, Warned)]


@pytest.mark.parametrize("kind", ["policy", "sampled"])
async def test_on_policy_ratios_are_one_whichever_log_probabilities_are_asked_for(
    client, job_spec, kind
):
    sampling = {"temperature": 0.7, "logprobs_kind": kind, "max_logprob_gap": 1e-3}
    spec = job_spec(stop={"max_steps": 3}, evaluation=None, sampling=sampling)
    steps, warnings = await _run(client, spec)
    assert len(steps) == 3
    assert "LOGPROB_GAP" not in warnings
    for metrics in steps:
        assert 0 <= metrics["logprob_gap_mean"] <= metrics["logprob_gap_max"] < 1e-4
        assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4)


async def test_completions_that_continue_on_the_newest_keep_the_bound(client, job_spec):
    spec = job_spec(
        stop={"max_steps": 8},
        algorithm={"max_staleness": 2},
        sampling={"continue_on_newest": True},
        evaluation=None,
    )
    steps, _ = await _run(client, spec)
    assert len(steps) == 8
    assert max(metrics["staleness_max"] for metrics in steps) <= 2
