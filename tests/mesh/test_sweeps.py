"""A sweep on a real mesh: its jobs share the fleet, and the losers end at the comparisons."""

from __future__ import annotations

import asyncio

import pytest

from rollmesh.job import StateChanged, StepCompleted
from rollmesh.sweep import SweepSpec

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROJECT = "projects/test"
PEAK = "algorithm.learning_rate.peak"


async def test_four_jobs_come_down_to_one_by_their_evaluations(client, job_spec):
    base = job_spec(
        algorithm={"groups_per_step": 2, "group_size": 4},
        evaluation={"every_steps": 1, "max_tasks": 16},
        stop={"max_steps": 3},
    )
    rates = [1e-3, 1e-4, 1e-5, 1e-6]
    spec = SweepSpec.model_validate(
        {
            "base": base,
            "grid": [{"path": PEAK, "values": rates}],
            "halving": {"first_step": 1, "factor": 2},
        }
    )

    sweep = await client.sweeps.create(PROJECT, spec)
    histories = await asyncio.gather(
        *(_history(client, f"{sweep.name.replace('/sweeps/', '/jobs/')}-{n}") for n in range(4))
    )

    sweep = await client.sweeps.get(sweep.name)
    assert sweep.state == "ENDED", sweep
    assert [(job.state, job.step, job.rung, job.halved) for job in sweep.jobs] == [
        ("SUCCEEDED", 3, 2, False),
        ("CANCELLED", 2, 1, True),
        ("CANCELLED", 1, 0, True),
        ("CANCELLED", 1, 0, True),
    ]
    assert sorted(job.values[PEAK] for job in sweep.jobs) == sorted(rates)
    # Held and gone on with, each step was taken once.
    assert sorted(histories) == [[1], [1], [1, 2], [1, 2, 3]]
    for job in sweep.jobs[1:]:
        step = job.step
        assert job.state_reason.startswith(f"successive halving at step {step}: evaluation ")
        assert f"{job.metric:.4g} is " in job.state_reason


async def _history(client, job: str) -> list[int]:
    """The steps that the job took until it ended, and nothing that failed it."""
    steps = []
    async for event in client.jobs.watch(job):
        if isinstance(event.event, StepCompleted):
            steps.append(event.event.step)
        if isinstance(event.event, StateChanged):
            assert event.event.to_state != "FAILED", event.event.reason
    return steps
