"""A local mesh with a gateway: HTTP beside gRPC, started, probed and stopped in its turn."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from services.gateway.config import GatewayConfig
from services.local.__main__ import _description
from services.local.config import LocalConfig
from services.local.mesh import mesh as running_mesh
from services.local.probes import _http_status

ROOT = Path(__file__).resolve().parents[2]


def config_with(gateway):
    values = yaml.safe_load((ROOT / "examples" / "local.yaml").read_text())
    (sampler,) = values["samplers"]
    # Nothing is sampled here, and the engine is slow to start.
    sampler["backend"] = "transformers"
    sampler.pop("kv_cache_memory")
    return LocalConfig.parse({**values, "gateway": gateway}, source="test")


async def test_the_gateway_serves_is_announced_and_ends_before_the_coordinator(tmp_path):
    gateway = {"drain_s": 1.0}
    said: list[str] = []
    async with running_mesh(
        config_with(gateway), tmp_path, said.append, modules={"gateway": "tests.fakes.gateway"}
    ) as mesh:
        member = mesh.members["gateway"]
        assert mesh.gateway_url == f"http://{member.address}"
        assert await _http_status(member.address) == b"200"
        assert "gateway is serving" in said
        assert f"export TINKER_BASE_URL=http://{member.address}" in _description(mesh)
        endpoints = json.loads((tmp_path / "endpoints.json").read_text())
        assert endpoints["gateway"] == {"address": member.address, "log": str(member.log)}
        told = GatewayConfig.load(tmp_path / "config" / "gateway.yaml")
        assert told.coordinator == mesh.address
        assert told.drain_s == 1.0
        first = member.pid
        mesh.kill("gateway")
        await mesh.serving()
        assert member.pid != first
    assert "at the end the coordinator serves: True" in member.log.read_text()
