"""The coordinator is killed at random points while jobs run: each ends as if it had not been."""

from __future__ import annotations

import asyncio
import os
import random
import time
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
from sqlalchemy import select
from sqlalchemy.ext.asyncio import create_async_engine

from rollmesh.client import Client
from rollmesh.errors import MeshError
from rollmesh.job import JobSpec, StateChanged, StepCompleted, Warned
from services.coordinator.group_bytes import group_from_bytes
from services.coordinator.rollouts import TaskOrder
from services.coordinator.store import check_url
from services.coordinator.store.tables import job_groups, jobs
from services.coordinator.tasks import Taskmaster
from tests.chaos.job_world import job_world
from tests.chaos.script import insist
from tests.fakes.databases import postgresql_server
from tests.fakes.worlds import FakeEnvironments

KILLS = os.environ.get("CHAOS_COORDINATOR_KILLS")
SEED = int(os.environ.get("CHAOS_SEED", "20"))
RECOVERY_S = 120.0
"""A coordinator that takes longer does not come back."""
GROUPS_PER_STEP = 3
GROUP_SIZE = 2
# Strictly on-policy; overlapping; overlapping more, with groups that are replaced.
JOBS = {
    "projects/red/jobs/{}-a": {"max_staleness": 0},
    "projects/red/jobs/{}-b": {"max_staleness": 1},
    "projects/blue/jobs/{}-c": {"max_staleness": 2, "max_group_replacements": 2},
}


def spec_of(algorithm, steps) -> JobSpec:
    sizes = {"group_size": GROUP_SIZE, "groups_per_step": GROUPS_PER_STEP}
    return JobSpec.model_validate(
        {
            "base_model": "arith",
            "adapter": {"rank": 4},
            "dataset": {
                "generator": {
                    "name": "arithmetic",
                    "parameters": {"split": "train", "count": 40, "max_digits": 1},
                }
            },
            "prompt": {"messages": [{"role": "user", "content": "{question}"}]},
            "reward": {"function": "exact_match", "reference": "{answer}"},
            "algorithm": {**sizes, **algorithm},
            "sampling": {"max_tokens": 6},
            "stop": {"max_steps": steps},
            "seed": 5,
        }
    )


@dataclass
class Storm:
    """Kills the coordinator, each time when the jobs have told so many steps in all."""

    coordinator: object
    groups: object
    goals: list[int]
    rng: random.Random
    steps: int = 0
    running: int = len(JOBS)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    recoveries: list[tuple[int, float]] = field(default_factory=list)
    kept: list[dict[str, dict[int, bytes]]] = field(default_factory=list)

    async def told(self, event) -> None:
        """A job told an event, for the first time."""
        async with self.changed:
            self.steps += isinstance(event, StepCompleted)
            self.running -= ended(event)
            self.changed.notify_all()

    async def rage(self) -> None:
        """Kill at each goal, wherever the next one is; note what had been kept by then."""
        for goal in self.goals:
            async with self.changed:
                await self.changed.wait_for(lambda goal=goal: self.steps >= goal)
            # Anywhere in what is done then: sampling, scoring, training, recording.
            await asyncio.sleep(self.rng.uniform(0, 0.2))
            before, start = self.steps, time.monotonic()
            await self.coordinator.kill_and_restart()
            self.kept.append(await self.groups())
            async with asyncio.timeout(RECOVERY_S), self.changed:
                await self.changed.wait_for(
                    lambda before=before: self.steps > before or not self.running
                )
            self.recoveries.append((before, time.monotonic() - start))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory):
    async with job_world(tmp_path_factory.mktemp("jobs")) as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    """Its name and its URL."""
    if request.param == "sqlite":
        yield "sqlite", f"sqlite:///{tmp_path}/store.sqlite"
        return
    with postgresql_server() as server:
        yield "postgresql", f"{server}/postgres"


@pytest.mark.timeout(3600)
@pytest.mark.asyncio(loop_scope="module")
async def test_jobs_survive_a_coordinator_that_is_killed_at_random_points(world, database, capsys):
    name, url = database
    kills = int(KILLS or {"sqlite": 6, "postgresql": 4}[name])
    steps = 4 + 3 * kills
    rng = random.Random(f"{SEED} {name}")
    specs = {job.format(name): spec_of(algorithm, steps) for job, algorithm in JOBS.items()}
    start = time.monotonic()
    async with world.coordinator(name, url) as coordinator, Client(coordinator.address) as client:
        engine = create_async_engine(check_url(url))
        goals = sorted(rng.sample(range(len(specs) * (steps - 1)), kills))
        storm = Storm(coordinator, lambda: groups_in(engine), goals, rng)
        for job, spec in specs.items():
            parent, _, job_id = job.partition("/jobs/")
            await client.jobs.create(parent, spec, job_id)
        async with asyncio.TaskGroup() as tasks:
            watched = {job: tasks.create_task(watch(client, job, storm)) for job in specs}
            await storm.rage()
        events = {job: task.result() for job, task in watched.items()}
        for job in specs:
            told = await insist(lambda job=job: client.jobs.get(job))
            adapter = await insist(lambda told=told: client.adapters.get(told.adapter))
            assert (told.state, told.step) == ("SUCCEEDED", steps), told.state_reason
            # As many ops as there are steps, each of which was taken once.
            assert (adapter.policy_version, adapter.next_sequence) == (steps, 2 * steps + 1)
        groups = await groups_in(engine)
        await engine.dispose()
    tell(name, storm, time.monotonic() - start, steps, events, capsys)
    assert len(storm.recoveries) == kills
    for job, spec in specs.items():
        check_events(events[job], steps)
        await check_groups(groups[job], [kept.get(job, {}) for kept in storm.kept], spec)


async def watch(client, job, storm):
    """All events of a job, as a client sees them that asks again where it was cut off."""
    events = []
    async with asyncio.timeout(3000):
        while not (events and ended(events[-1].event)):
            try:
                async for event in client.jobs.watch(job, after_event=len(events)):
                    events.append(event)
                    await storm.told(event.event)
            except MeshError:
                await asyncio.sleep(0.05)
    return events


def ended(event) -> bool:
    return isinstance(event, StateChanged) and event.to_state in {"SUCCEEDED", "FAILED"}


def check_events(events, steps):
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    told = [event.event for event in events if isinstance(event.event, StepCompleted)]
    assert [step.step for step in told] == list(range(1, steps + 1))
    assert [step.policy_version for step in told] == list(range(1, steps + 1))
    for step in told:
        assert step.metrics["num_rollouts"] == GROUPS_PER_STEP * GROUP_SIZE
        assert {"loss", "grad_norm", "reward_mean"} <= set(step.metrics), "a step tells everything"


async def check_groups(groups, at_each_kill, spec):
    """Of the groups that were trained, and of those that were kept at each kill."""
    tasks = await Taskmaster(FakeEnvironments()).training(spec)
    algorithm, order = spec.algorithm, TaskOrder(tasks, spec.seed)
    assert sorted(groups) == list(range(spec.stop.max_steps * GROUPS_PER_STEP))
    for number, body in groups.items():
        group = group_from_bytes(body)
        staleness = number // GROUPS_PER_STEP - group.policy_version
        assert 0 <= staleness <= algorithm.max_staleness
        assert group.task == order.choose(number, group.attempt)
        assert group.attempt <= algorithm.max_group_replacements
    for kept in at_each_kill:
        for number, body in kept.items():
            # Not sampled again; or replaced, as it was to be.
            if body != groups[number]:
                before, trained = group_from_bytes(body), group_from_bytes(groups[number])
                assert before.attempt < trained.attempt
                assert min(before.rewards) == max(before.rewards)


async def groups_in(engine) -> dict[str, dict[int, bytes]]:
    """All groups in the store, by job and number."""
    query = select(jobs.c.name, job_groups.c.number, job_groups.c.body).join(
        jobs, jobs.c.id == job_groups.c.job_id
    )
    found: dict[str, dict[int, bytes]] = {}
    async with engine.connect() as connection:
        for job, number, body in await connection.execute(query):
            found.setdefault(job, {})[number] = body
    return found


def tell(name, storm, took_s, steps, events, capsys):
    """How long each recovery took, until any job had told its next step."""
    warned = [
        event.event.reason
        for all_of in events.values()
        for event in all_of
        if isinstance(event.event, Warned)
    ]
    times = sorted(took for _, took in storm.recoveries) or [0.0]
    with capsys.disabled():
        print(f"\nchaos: {name}, seed {SEED}, 3 jobs of {steps} steps, {took_s:.0f} s")
        print(f"{len(times)} kills after steps {[after for after, _ in storm.recoveries]}")
        print(f"recovery: median {times[len(times) // 2]:.1f} s, longest {times[-1]:.1f} s")
        ready = [
            sum(len(kept) for kept in at.values()) - GROUPS_PER_STEP * after
            for at, (after, _) in zip(storm.kept, storm.recoveries, strict=True)
        ]
        print(f"groups that waited for their step then: {ready}")
        print(f"warnings: { {reason: warned.count(reason) for reason in sorted(set(warned))} }")
