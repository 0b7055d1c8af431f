"""Fuzz of the gateway, shorter than that of the contract, on real trainers and samplers."""

from __future__ import annotations

import asyncio
import os

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rollmesh.client import Client
from services.gateway.web.endpoints import ENDPOINTS
from tests.contract.gateway_bodies import request
from tests.contract.gateway_world import Neighbour, Tenant
from tests.contract.test_gateway_fuzz import OPENAI, check, send

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(900)]

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
"""Of all endpoints together."""
TABLE = sorted([*ENDPOINTS, *OPENAI])
NEIGHBOUR, FUZZER = "fuzz-neighbour", "fuzzer"


async def test_whatever_comes_is_answered_and_the_neighbours_results_stay_the_same(mesh):
    async with Client(mesh.address) as client:
        keys = {
            project: (await client.keys.create(f"projects/{project}"))[1]
            for project in (NEIGHBOUR, FUZZER)
        }
    pids = {name: member.pid for name, member in mesh.members.items()}
    await asyncio.to_thread(fuzz, f"{mesh.gateway_url}/api/v1/", keys)
    assert {name: member.pid for name, member in mesh.members.items()} == pids


def fuzz(url: str, keys: dict[str, str]) -> None:
    clients = {
        project: httpx.Client(base_url=url, headers={"X-API-Key": key}, timeout=120.0)
        for project, key in keys.items()
    }
    http = clients[FUZZER]
    with http, Neighbour(clients[NEIGHBOUR]) as neighbour:
        _, own = Tenant(http).work()

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def run(data: st.DataObject) -> None:
            endpoint = data.draw(st.sampled_from(TABLE))
            sent, key = request(data.draw, endpoint, own, neighbour.names)
            check(send(http, sent, key), sent)

        run()
    # It has ended the run that it was at.
    assert neighbour.error is None, neighbour.error
    assert neighbour.num_runs > 0
