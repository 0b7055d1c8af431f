"""Jobs in environments of three languages at once, with the tiny model that plays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from rollmesh.client import Client, RewardClient
from rollmesh.job import EvaluationCompleted, JobSpec, StateChanged, StepCompleted, Warned
from rollmesh.rpc.channel import channel
from services.local.config import LocalConfig
from services.local.mesh import mesh as running_mesh
from tests.contract.example_environments import EXAMPLES, built

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.local.mesh import Mesh

pytestmark = pytest.mark.asyncio(loop_scope="session")
ROOT = Path(__file__).resolve().parents[2]
PROJECT = "projects/players"
MODEL = {"name": "player", "path": str(ROOT / "models" / "player")}
NODE, GO = EXAMPLES["guess-the-number"], EXAMPLES["grid-world"]
COMMANDS = {
    "guess-the-number": ["node", str(NODE.folder / "main.js")],
    "grid-world": [str(GO.folder / GO.command[0])],
    "calculator": ["python", str(ROOT / "examples" / "environments" / "python" / "calculator.py")],
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mesh(tmp_path_factory) -> AsyncIterator[Mesh]:
    """A mesh that serves `player`, and starts an environment in Node, one in Go, one in Python."""
    for example in (NODE, GO):
        await built(example)
    config = LocalConfig.model_validate(
        {
            "coordinator": {"base_models": [{"name": "player", "tokenizer": MODEL["path"]}]},
            "trainers": [{"base_model": MODEL, "num_threads": 1, "max_batch_tokens": 2048}],
            "samplers": [
                {
                    "base_model": MODEL,
                    "dtype": "float32",
                    "num_threads": 1,
                    "max_rank": 16,
                    "max_loras": 3,
                    "kv_cache_memory": "256MiB",
                }
            ],
            "environments": [
                {"name": name, "command": command} for name, command in COMMANDS.items()
            ],
        }
    )
    async with running_mesh(config, tmp_path_factory.mktemp("players")) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def client(mesh) -> AsyncIterator[Client]:
    async with Client(mesh.address) as connected:
        yield connected


def job_in(environment: str, *, max_tokens: int = 8, steps: int = 8, **changes) -> JobSpec:
    values = {
        "base_model": "player",
        "environment": {"name": environment},
        "dataset": {"split": "train"},
        "algorithm": {
            "groups_per_step": 8,
            "group_size": 8,
            "learning_rate": {"peak": 3e-3},
        },
        "sampling": {"max_tokens": max_tokens},
        "stop": {"max_steps": steps},
    }
    return JobSpec.model_validate({**values, **changes})


async def ran(client, spec) -> tuple[str, list]:
    job = await client.jobs.create(PROJECT, spec)
    return job.name, [event.event async for event in client.jobs.watch(job.name)]


def steps_of(events) -> list[StepCompleted]:
    assert isinstance(events[-1], StateChanged)
    assert events[-1].to_state == "SUCCEEDED", events[-1].reason
    return [event for event in events if isinstance(event, StepCompleted)]


async def running_there(mesh) -> dict[str, tuple[int, int]]:
    """Of each environment, what runs and waits there as the reward service counts."""
    async with channel(mesh.members["reward"].address) as connected:
        told = await RewardClient(connected).list_environments()
    return {status.name: (status.num_running, status.num_waiting) for status in told}


async def until_nothing_runs(mesh) -> None:
    """Return once no environment has anything open."""
    async with asyncio.timeout(20):
        while any(map(any, (await running_there(mesh)).values())):
            await asyncio.sleep(0.1)


async def test_jobs_learn_in_environments_of_three_languages_at_once(client, mesh):
    evaluation = {"dataset": {"split": "heldout"}, "max_tasks": 48}
    specs = [
        job_in("guess-the-number", max_tokens=3, evaluation=evaluation),
        job_in("grid-world", max_tokens=8, evaluation=evaluation),
        job_in("calculator", max_tokens=80, evaluation=evaluation),
    ]
    found = await asyncio.gather(*(ran(client, spec) for spec in specs))
    for spec, (_, events) in zip(specs, found, strict=True):
        steps = steps_of(events)
        rewards = [step.metrics["reward_mean"] for step in steps]
        evaluations = [e.reward_mean for e in events if isinstance(e, EvaluationCompleted)]
        print(spec.environment.name, [round(r, 2) for r in rewards], evaluations)
        assert mean(rewards[-3:]) > mean(rewards[:3]) + 0.08, (spec.environment.name, rewards)
        assert all(step.metrics["staleness_max"] == 0 for step in steps)
        assert steps[-1].metrics["turns_mean"] > 1
        assert steps[-1].metrics["rollouts_given_up"] == 0
    # The one with a tool calls it more and more often: without it there is nothing to be had.
    turns = [step.metrics["turns_mean"] for step in steps_of(found[2][1])]
    assert turns[-1] > turns[0]
    await until_nothing_runs(mesh)


async def test_an_environment_that_is_killed_costs_a_job_time_alone(client, mesh):
    member = "environment-guess-the-number"
    spec = job_in("guess-the-number", max_tokens=3, steps=6)
    job = await client.jobs.create(PROJECT, spec)
    events = []
    async for event in client.jobs.watch(job.name):
        events.append(event.event)
        if isinstance(event.event, StepCompleted) and event.event.step == 2:
            mesh.kill(member)
    steps = steps_of(events)
    assert [step.step for step in steps] == list(range(1, 7))
    assert steps[-1].metrics["rollouts_given_up"] == 0
    warned = {event.reason for event in events if isinstance(event, Warned)}
    assert warned <= {"ENVIRONMENT_UNAVAILABLE"}
    await mesh.serving()
    await until_nothing_runs(mesh)


async def test_an_environment_that_stands_still_is_named_by_the_job_and_by_the_fleet(client, mesh):
    pid = mesh.members["environment-grid-world"].pid
    job = await client.jobs.create(PROJECT, job_in("grid-world", steps=1000))
    async for event in client.jobs.watch(job.name):
        if isinstance(event.event, StepCompleted):
            break
    os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(20):
            while not any(
                "'grid-world'" in each for each in (await client.jobs.get(job.name)).problems
            ):
                await asyncio.sleep(0.1)
        members = {m.address: m for m in (await client.fleet.get()).members}
        assert not members["grid-world"].serving
        assert members["calculator"].serving
    finally:
        os.kill(pid, signal.SIGCONT)
    step = (await client.jobs.get(job.name)).step
    async for event in client.jobs.watch(job.name):
        if isinstance(event.event, StepCompleted) and event.event.step > step + 1:
            break
    await client.jobs.cancel(job.name)
    await until_nothing_runs(mesh)


async def test_a_cancelled_job_leaves_nothing_open_in_its_environment(client, mesh):
    job = await client.jobs.create(PROJECT, job_in("calculator", max_tokens=80, steps=1000))
    async with asyncio.timeout(60):
        while not (await running_there(mesh))["calculator"][0]:
            await asyncio.sleep(0.02)
    await client.jobs.cancel(job.name)
    await until_nothing_runs(mesh)


async def test_the_reward_service_that_is_killed_costs_a_job_time_alone(client, mesh):
    job = await client.jobs.create(PROJECT, job_in("guess-the-number", max_tokens=3, steps=5))
    events = []
    async for event in client.jobs.watch(job.name):
        events.append(event.event)
        if isinstance(event.event, StepCompleted) and event.event.step == 2:
            mesh.kill("reward")
    assert [step.step for step in steps_of(events)] == [1, 2, 3, 4, 5]
    await mesh.serving()
    with contextlib.suppress(TimeoutError):
        await until_nothing_runs(mesh)
    assert not any(map(any, (await running_there(mesh)).values()))
