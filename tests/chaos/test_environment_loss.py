"""Environments are killed and stand still while jobs play in them: the jobs end as if nothing was.

CHAOS_ENVIRONMENT_FAULTS says how many faults at least, CHAOS_SEED which ones.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from rollmesh.client import Client, RewardClient
from rollmesh.job import JobSpec, StateChanged, StepCompleted, Warned
from rollmesh.rpc.channel import channel
from services.local.config import LocalConfig
from services.local.mesh import mesh as running_mesh
from tests.contract.example_environments import EXAMPLES, built

ROOT = Path(__file__).resolve().parents[2]
PLAYER = {"name": "player", "path": str(ROOT / "models" / "player")}
NODE = EXAMPLES["guess-the-number"]
PYTHON = ROOT / "examples" / "environments" / "python" / "calculator.py"
ENVIRONMENTS = {
    "guess-the-number": ["node", str(NODE.folder / "main.js")],
    "calculator": ["python", str(PYTHON)],
}
MAX_TOKENS = {"guess-the-number": 3, "calculator": 80}
PROJECT = "projects/chaos"
FAULTS = int(os.environ.get("CHAOS_ENVIRONMENT_FAULTS", "6"))
SEED = int(os.environ.get("CHAOS_SEED", "20"))
STEPS = 3 + FAULTS // 2
WARM_UP_STEPS = 2


def config() -> LocalConfig:
    sampler = {
        "base_model": PLAYER,
        "dtype": "float32",
        "num_threads": 1,
        "max_rank": 16,
        "max_loras": 2,
        "kv_cache_memory": "256MiB",
    }
    return LocalConfig.model_validate(
        {
            "coordinator": {"base_models": [{"name": "player", "tokenizer": PLAYER["path"]}]},
            "trainers": [{"base_model": PLAYER, "num_threads": 1, "max_batch_tokens": 2048}],
            "samplers": [sampler],
            "environments": [
                {"name": name, "command": command} for name, command in ENVIRONMENTS.items()
            ],
        }
    )


def job_in(environment: str, steps: int) -> JobSpec:
    return JobSpec.model_validate(
        {
            "base_model": "player",
            "environment": {"name": environment, "max_failures": 0},
            "dataset": {"split": "train"},
            "algorithm": {"groups_per_step": 4, "group_size": 4, "max_staleness": 1},
            "sampling": {"max_tokens": MAX_TOKENS[environment]},
            "stop": {"max_steps": steps},
        }
    )


async def ran(client, environment: str, steps: int) -> list:
    job = await client.jobs.create(PROJECT, job_in(environment, steps))
    return [event.event async for event in client.jobs.watch(job.name)]


class Storm:
    """Kills environments, or has them stand still for a while, one after the other."""

    def __init__(self, mesh, rng: random.Random) -> None:
        self._mesh = mesh
        self._rng = rng
        self.kills = 0
        self.stalls = 0

    async def blow(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._rng.uniform(0.5, 4))
            member = f"environment-{self._rng.choice(sorted(ENVIRONMENTS))}"
            if self._rng.random() < 0.5:
                self._mesh.kill(member)
                self.kills += 1
            elif pid := self._mesh.members[member].pid:
                await self._stall(pid)

    async def _stall(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        self.stalls += 1
        try:
            # Shorter and longer than what is put up with.
            await asyncio.sleep(self._rng.uniform(0.2, 8))
        finally:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGCONT)

    @property
    def faults(self) -> int:
        return self.kills + self.stalls


def holding(mesh) -> dict[str, int]:
    """What the reward service has: open files, threads, processes below it, MiB."""
    process = psutil.Process(mesh.members["reward"].pid)
    return {
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
        "mib": process.memory_info().rss >> 20,
    }


async def nothing_runs(mesh) -> None:
    async with (
        channel(mesh.members["reward"].address) as connected,
        asyncio.timeout(30),
    ):
        client = RewardClient(connected)
        while any(
            status.num_running or status.num_waiting or not status.serving
            for status in await client.list_environments()
        ):
            await asyncio.sleep(0.1)


@pytest.mark.timeout(300 + 30 * FAULTS)
async def test_jobs_end_well_and_nothing_leaks_while_their_environments_die_and_stand_still(
    tmp_path,
):
    await built(NODE)
    async with running_mesh(config(), tmp_path) as mesh, Client(mesh.address) as client:
        await asyncio.gather(*(ran(client, name, WARM_UP_STEPS) for name in ENVIRONMENTS))
        await nothing_runs(mesh)
        before = holding(mesh)
        storm = Storm(mesh, random.Random(SEED))
        begin, histories = time.monotonic(), []
        while storm.faults < FAULTS:
            blowing = asyncio.create_task(storm.blow())
            histories += await asyncio.gather(*(ran(client, name, STEPS) for name in ENVIRONMENTS))
            blowing.cancel()
            await asyncio.gather(blowing, return_exceptions=True)
        await mesh.serving()
        await nothing_runs(mesh)
        after = holding(mesh)
    print(
        f"{storm.kills} kills and {storm.stalls} stalls in {time.monotonic() - begin:.0f} s; "
        f"reward service before {before}, after {after}"
    )
    for events in histories:
        assert isinstance(events[-1], StateChanged)
        assert events[-1].to_state == "SUCCEEDED", events[-1].reason
        steps = [event for event in events if isinstance(event, StepCompleted)]
        assert [step.step for step in steps] == list(range(1, STEPS + 1))
        assert all(step.metrics["rollouts_given_up"] == 0 for step in steps)
        assert max(step.metrics["staleness_max"] for step in steps) <= 1
        warned = {event.reason for event in events if isinstance(event, Warned)}
        assert warned <= {"ENVIRONMENT_UNAVAILABLE", "REWARD_UNAVAILABLE"}, warned
    assert after["children"] == before["children"]
    assert after["threads"] <= before["threads"] + 4
    assert after["files"] <= before["files"] + 4
    assert after["mib"] <= before["mib"] + 48
