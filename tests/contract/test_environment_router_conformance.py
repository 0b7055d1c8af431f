"""What authors promise holds through the reward service too: the kit's rules, at its address."""

from __future__ import annotations

import pytest

from rollmesh.environment.conformance import check
from tests.fakes.environments import LIMIT, Parrot, served
from tests.fakes.routing import environment, routed


@pytest.mark.parametrize("name", ["parrot", "bird"])
async def test_an_environment_passes_every_rule_through_the_service_too(name):
    async with served(Parrot()) as port:
        # Without a queue what is beyond the environment's limit is refused, as it does it itself.
        config = environment(port, name=name, remote_name="parrot", max_waiting=0)
        async with routed(config) as world:
            await world.serves(name)
            (report,) = await check(f"127.0.0.1:{world.port}", num_episodes=LIMIT)
    failed = {
        verdict.rule: verdict.reason for verdict in report.verdicts if verdict.outcome == "failed"
    }
    assert failed == {}
    skipped = {verdict.rule for verdict in report.verdicts if verdict.outcome == "skipped"}
    # Batches may be as large as they like: they are cut up on the way.
    assert skipped == {"environment-unknown", "offers-no-more", "score-refuses-too-many"}
