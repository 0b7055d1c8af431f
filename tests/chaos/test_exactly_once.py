"""Trainers and coordinator are killed at random points; the weights come out bit-identical."""

from __future__ import annotations

import asyncio
import os
import random
import time
from dataclasses import dataclass

import pytest

from rollmesh.client import Client
from tests.chaos.script import Trace, train
from tests.chaos.world import TRAINERS, World, world

KILLS = int(os.environ.get("CHAOS_KILLS", "60"))
SEED = int(os.environ.get("CHAOS_SEED", "20"))
OPS_PER_KILL = 4
"""Enough for every kill to meet ops under way, few enough that a run takes minutes."""
SCRIPTS = (
    "projects/red/adapters/{}-a",
    "projects/red/adapters/{}-b",
    "projects/blue/adapters/{}-c",
)
OPS_PER_STEP = 2.5


@dataclass
class Recovery:
    """A kill, and how long it took until each adapter's next op was answered, in seconds."""

    kill: int
    service: str
    after_ops: int
    took_s: float


class Storm:
    """Kills a service each time that so many ops were answered as its plan says."""

    def __init__(self, mesh: World, adapters: list[str], rng: random.Random, kills: int) -> None:
        self._mesh = mesh
        self._rng = rng
        self._kills = kills
        self._answers = 0
        self._running = set(adapters)
        self._changed = asyncio.Condition()
        self._heard: set[str] = set()
        self.recoveries: list[Recovery] = []

    def answered(self, adapter: str) -> None:
        """An op of `adapter` was answered."""
        self._answers += 1
        self._heard.add(adapter)
        self._wake.set()

    def finished(self, adapter: str) -> None:
        """`adapter` has no more ops."""
        self._running.discard(adapter)
        self._wake.set()

    async def rage(self) -> None:
        """Kill, wait until every adapter goes on, kill again."""
        self._wake = asyncio.Event()
        for kill in range(1, self._kills + 1):
            goal = self._answers + self._rng.randint(0, 2 * OPS_PER_KILL - 2)
            await self._until(lambda goal=goal: self._answers >= goal)
            # Anywhere in the ops that run now: before, in or after their journal, pass or answer.
            await asyncio.sleep(self._rng.uniform(0, 0.15))
            if not self._running:
                return
            service = self._rng.choice(["coordinator", *TRAINERS])
            after, start = self._answers, time.monotonic()
            self._heard.clear()
            await self._mesh.services[service].kill_and_restart()
            if self._rng.random() < 0.8:  # else the next one comes in the middle of the recovery
                await self._until(lambda: self._running <= self._heard)
            took_s = time.monotonic() - start
            self.recoveries.append(Recovery(kill, service, after, took_s))

    async def _until(self, holds) -> None:
        while self._running and not holds():
            self._wake.clear()
            await self._wake.wait()


@pytest.mark.timeout(3600)
async def test_killed_at_random_points_no_op_is_lost_or_doubled(tmp_path, capsys):
    steps = max(6, round(KILLS * OPS_PER_KILL / len(SCRIPTS) / OPS_PER_STEP))
    async with world(tmp_path) as mesh, Client(mesh.address) as client:
        calm = await run_all(client, "calm", steps, storm=None)
        adapters = [name.format("storm") for name in SCRIPTS]
        storm = Storm(mesh, adapters, random.Random(SEED), KILLS)
        start = time.monotonic()
        wild = await run_all(client, "storm", steps, storm=storm)
        took_s = time.monotonic() - start
        for service in mesh.services.values():
            await service.until_serving()
    tell(storm, took_s, steps, capsys)
    for (calm_digest, calm_trace), (wild_digest, wild_trace) in zip(calm, wild, strict=True):
        assert wild_trace.results == calm_trace.results
        assert wild_digest == calm_digest
    assert len(storm.recoveries) == KILLS, "the ops ended before the kills: raise OPS_PER_KILL"


async def run_all(client, prefix, steps, *, storm):
    """Digest and trace of each script."""

    async def one(script: int, name: str):
        trace = Trace(storm.answered if storm else lambda adapter: None)
        digest = await train(client, name, script, steps, trace)
        if storm:
            storm.finished(name)
        return digest, trace

    async with asyncio.TaskGroup() as tasks:
        raging = tasks.create_task(storm.rage()) if storm else None
        # The storm makes its event before anybody can be heard.
        await asyncio.sleep(0)
        running = [
            tasks.create_task(one(script, name.format(prefix)))
            for script, name in enumerate(SCRIPTS)
        ]
        if raging:
            await raging
    return [task.result() for task in running]


def tell(storm, took_s, steps, capsys):
    """How long each recovery took."""
    with capsys.disabled():
        print(f"\nchaos: seed {SEED}, {steps} steps of 3 adapters of 2 projects, {took_s:.0f} s")
        print(f"{'kill':>5}  {'service':<12} {'after op':>8} {'recovery s':>11}")
        for each in storm.recoveries:
            print(f"{each.kill:>5}  {each.service:<12} {each.after_ops:>8} {each.took_s:>11.2f}")
        times = sorted(each.took_s for each in storm.recoveries) or [0.0]
        print(f"recovery: median {times[len(times) // 2]:.2f} s, longest {times[-1]:.2f} s")
