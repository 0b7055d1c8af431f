"""Gateways and samplers are killed under users of the Tinker SDK, who notice nothing but time."""

from __future__ import annotations

import os
import random
import time

import pytest
import pytest_asyncio

from tests.chaos.gateway_world import Storm, Turns, gateway_mesh, more_gateways, run_loops

KILLS = int(os.environ.get("CHAOS_GATEWAY_KILLS", "4"))
SEED = int(os.environ.get("CHAOS_SEED", "20"))
TURNS_PER_STEP = 4
STEPS = 2 + KILLS * 4 // TURNS_PER_STEP
"""Enough for a loop to last until the last kill: at most four turns go by with each."""
VICTIMS = ["gateway", "gateway", "sampler-0", "sampler-1"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory):
    """The mesh, its folder, and what the loops come to alone and undisturbed."""
    folder = tmp_path_factory.mktemp("mesh")
    async with gateway_mesh(folder) as mesh:
        yield mesh, folder, await run_loops(mesh, mesh.gateway_url, STEPS, at_once=False)


def assert_as_alone(alone, disturbed):
    """Every result and every weight."""
    for (calm_trace, calm_digest), (trace, digest) in zip(alone, disturbed, strict=True):
        assert trace.results == calm_trace.results
        assert digest == calm_digest


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.timeout(3600)
async def test_two_users_train_to_the_same_weights_while_gateway_and_samplers_are_killed(
    world, capsys
):
    mesh, _, alone = world

    async def kill(name: str) -> None:
        await mesh.members[name].supervised.serving.wait()
        mesh.kill(name)

    storm = Storm(kill, VICTIMS)
    start = time.monotonic()
    disturbed = await run_loops(
        mesh,
        mesh.gateway_url,
        STEPS,
        storm=storm,
        raging=lambda: storm.rage(random.Random(SEED), KILLS),
    )
    took_s = time.monotonic() - start
    with capsys.disabled():
        print(f"\ngateway chaos: seed {SEED}, {STEPS} steps, {took_s:.0f} s, {storm.kills}")
    assert len(storm.kills) == KILLS, "the loops ended before the kills"
    assert_as_alone(alone, disturbed)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.timeout(1200)
async def test_of_three_gateways_any_knows_what_another_was_asked_also_when_one_dies(world):
    mesh, folder, alone = world
    async with more_gateways(mesh, folder, 2) as others:
        turns = Turns([mesh.members["gateway"].address, *others])

        async def kill(gateway: str) -> None:
            """For good: the proxy answers 503 in its place."""
            await turns.until_answered(gateway)
            others[gateway].kill()
            await others[gateway].wait()

        storm = Storm(kill, [list(others)[-1]])
        async with turns.serving() as url:
            disturbed = await run_loops(
                mesh, url, STEPS, storm=storm, raging=lambda: storm.rage(random.Random(SEED), 1)
            )
    assert_as_alone(alone, disturbed)
    assert set(turns.answered) == {mesh.members["gateway"].address, *others}
    elsewhere = [id_ for id_, taker in turns.taken.items() if set(turns.polled[id_]) - {taker}]
    assert elsewhere, "every result was asked for where the request was made"
