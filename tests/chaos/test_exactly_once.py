"""Trainers and coordinator are killed at random points; the weights come out bit-identical."""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
from dataclasses import dataclass

import pytest

from rollmesh.client import Client
from tests.chaos.script import Trace, train
from tests.chaos.world import TRAINERS, World, world

KILLS = int(os.environ.get("CHAOS_KILLS", "12"))
SEED = int(os.environ.get("CHAOS_SEED", "20"))
QUOTA = 2
"""Ops that an adapter may do before and after a kill: none runs ahead while another recovers."""
SCRIPTS = (
    "projects/red/adapters/{}-a",
    "projects/red/adapters/{}-b",
    "projects/blue/adapters/{}-c",
)
OPS_PER_STEP = 2.5
"""Of a script, on average."""


@dataclass
class Recovery:
    """A kill, and how long it took until each adapter's next op was answered, in seconds."""

    kill: int
    service: str
    after_ops: int
    took_s: float


class Storm:
    """Kills a service at random moments of the ops, and holds those up that run ahead."""

    def __init__(self, mesh: World, adapters: list[str], rng: random.Random, kills: int) -> None:
        self._mesh = mesh
        self._rng = rng
        self._kills = kills
        self._answers = 0
        self._running = set(adapters)
        self._used = dict.fromkeys(adapters, 0)
        self._over = False
        self._changed = asyncio.Condition()
        self.recoveries: list[Recovery] = []

    async def turn(self, adapter: str) -> None:
        """Return once `adapter` may do its next op."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._over or self._used[adapter] < QUOTA)

    async def answered(self, adapter: str) -> None:
        """An op of `adapter` was answered."""
        async with self._changed:
            self._answers += 1
            self._used[adapter] += 1
            self._changed.notify_all()

    async def finished(self, adapter: str) -> None:
        """`adapter` has no more ops."""
        async with self._changed:
            self._running.discard(adapter)
            self._changed.notify_all()

    async def rage(self) -> None:
        """Kill, wait until every adapter goes on, kill again."""
        for kill in range(1, self._kills + 1):
            goal = self._answers + self._rng.randint(0, QUOTA * len(SCRIPTS) - 1)
            await self._until(lambda goal=goal: self._answers >= goal)
            # Anywhere in the ops that run now: before, in or after their journal, pass or answer.
            await asyncio.sleep(self._rng.uniform(0, 0.05))
            if not self._running:
                return
            service = self._rng.choice(["coordinator", *TRAINERS])
            after, start = self._answers, time.monotonic()
            await self._mesh.services[service].kill_and_restart()
            if self._rng.random() < 0.8:  # else the next one comes in the middle of the recovery
                await self._until(lambda: all(self._used[adapter] for adapter in self._running))
            took_s = time.monotonic() - start
            self.recoveries.append(Recovery(kill, service, after, took_s))
        async with self._changed:
            self._over = True
            self._changed.notify_all()

    async def _until(self, holds) -> None:
        """Return once it holds, or no ops are left; until then everybody has a new quota."""
        async with self._changed:
            self._used = dict.fromkeys(self._used, 0)
            self._changed.notify_all()
            await self._changed.wait_for(lambda: holds() or not self._running)


@pytest.mark.timeout(3600)
async def test_killed_at_random_points_no_op_is_lost_or_doubled(tmp_path, capsys):
    steps = 6 + math.ceil(KILLS * 2 * QUOTA / OPS_PER_STEP)
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
    assert len(storm.recoveries) == KILLS, "the ops ended before the kills"


async def run_all(client, prefix, steps, *, storm):
    """Digest and trace of each script."""

    async def one(script: int, name: str):
        trace = Trace()
        digest = await train(client, name, script, steps, trace, storm)
        if storm:
            await storm.finished(name)
        return digest, trace

    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(one(script, name.format(prefix)))
            for script, name in enumerate(SCRIPTS)
        ]
        if storm:
            await storm.rage()
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
