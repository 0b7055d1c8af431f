"""Six jobs of three projects on one sampler: who gets how many tokens, and who waits for whom."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from rollmesh import types
from rollmesh.client import Client
from tests.mesh.conftest import WEIGHTS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# It needs the machine for itself: a coordinator that gets no processor time decides late.
pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.long]
COUNTED = 24_000
"""Tokens of all projects that shares are counted over: many times what is under way at once, which
is off by as much at the beginning and at the end."""
WARM_UP = 8_000
"""Tokens before that: more than the first project to come had under way when the others came, which
are its own however the shares are."""
TURNS = 2 * len(WEIGHTS)
"""A project that asks for little is served before any of the others had more turns than two: it
starts level with whoever is next, and owes at most what its own last request cost."""
POLL_S = 0.1


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def flooded(mesh, job_spec) -> AsyncIterator[Client]:
    """A client of a mesh with two jobs of each project, which sample for long before they train."""
    spec = job_spec(algorithm={"groups_per_step": 512, "group_size": 8}, evaluation=None)
    async with Client(mesh.address) as client:
        jobs = [
            await client.jobs.create(f"projects/{project}", spec, f"flood-{number}")
            for project in WEIGHTS
            for number in range(2)
        ]
        yield client
        for job in jobs:
            await client.jobs.cancel(job.name)


async def standing(client) -> tuple[dict[str, int], bool]:
    """Tokens of each project so far, and whether each has something waiting."""
    told = {project: await client.fleet.explain(f"projects/{project}") for project in WEIGHTS}
    tokens = {
        project: next(quota.used for quota in schedule.quotas if quota.name == "tokens_per_day")
        for project, schedule in told.items()
    }
    waiting = all(
        schedule.shares and schedule.shares[0].num_queued > 0 for schedule in told.values()
    )
    return tokens, waiting


async def contended(client) -> dict[str, int]:
    """Return once every project has something waiting; tokens of each by then."""
    while True:
        tokens, waiting = await standing(client)
        if waiting:
            return tokens
        await asyncio.sleep(POLL_S)


async def test_projects_get_tokens_in_proportion_to_their_weights(flooded):
    async with asyncio.timeout(300):
        first = sum((await contended(flooded)).values())
        while sum((before := (await standing(flooded))[0]).values()) < first + WARM_UP:
            await asyncio.sleep(POLL_S)
        counted = dict.fromkeys(WEIGHTS, 0)
        while sum(counted.values()) < COUNTED:
            await asyncio.sleep(POLL_S)
            tokens, waiting = await standing(flooded)
            assert waiting, "a project had nothing waiting: its share is not to be told"
            counted = {project: tokens[project] - before[project] for project in WEIGHTS}
    unit = sum(counted.values()) / sum(WEIGHTS.values())
    for project, weight in WEIGHTS.items():
        assert counted[project] / unit == pytest.approx(weight, rel=0.1), counted


async def test_a_light_project_waits_for_few_turns_of_those_that_flood(flooded):
    policy = types.PolicyRef(base_model="arith")
    async with asyncio.timeout(300):
        await contended(flooded)
        for _ in range(10):
            await flooded.sampling.sample("projects/light", policy, [5, 6, 7])
            assert await turns_before_the_last_of(flooded, "light") <= TURNS


async def turns_before_the_last_of(client, project: str) -> int:
    """Turns of others between the arrival of the last request of `project` and its own turn."""
    decisions = [
        decision
        for other in (*WEIGHTS, project)
        for decision in (await client.fleet.explain(f"projects/{other}")).decisions
    ]
    (mine, *_) = (one for one in decisions if one.subject.startswith(f"projects/{project}/"))
    assert mine.action == "ASSIGNED"
    (waited_s,) = re.findall(r"after ([0-9.]+) s", mine.reason)
    # That is told to the millisecond.
    since = mine.time - float(waited_s) - 0.0005
    return sum(since <= other.time <= mine.time for other in decisions) - 1
