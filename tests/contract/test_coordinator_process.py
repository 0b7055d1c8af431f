"""The coordinator as the process that an operator starts, ends and loses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rollmesh import convert
from rollmesh.api.reward.v1 import reward_service_pb2 as pb
from rollmesh.api.reward.v1.reward_service_pb2_grpc import (
    RewardServiceServicer,
    add_RewardServiceServicer_to_server,
)
from rollmesh.client import Client, JobClient
from rollmesh.errors import Unavailable
from rollmesh.rpc.channel import channel
from rollmesh.rpc.server import serving
from services.coordinator.servicers import SERVICES
from tests.fakes.coordinator import PROJECT, spec_of
from tests.fakes.mesh import FakeReward

ROOT = Path(__file__).parents[2]
NOBODY = "127.0.0.1:1"
J = f"{PROJECT}/jobs/j"


class RewardServicer(RewardServiceServicer):
    async def ScoreEach(self, requests, _context):
        batch = (await anext(aiter(requests))).batch
        items = convert.score_items_from_pb(batch.items)
        parameters = convert.struct_from_pb(batch.parameters)
        for score in await FakeReward().score_each(batch.function, parameters, items):
            yield pb.ScoreEachResponse(score=convert.item_score_to_pb(score))

    async def ListEnvironments(self, _request, _context):
        return pb.ListEnvironmentsResponse()


@pytest.fixture
async def config(tmp_path):
    """The file of a coordinator whose trainer and sampler are away."""
    async with serving(
        lambda server: add_RewardServiceServicer_to_server(RewardServicer(), server), services=[]
    ) as reward:
        path = tmp_path / "coordinator.yaml"
        path.write_text(
            yaml.safe_dump(
                {
                    "listen": "127.0.0.1:0",
                    "state_dir": str(tmp_path / "state"),
                    "trainers": [NOBODY],
                    "samplers": [NOBODY],
                    "reward": f"127.0.0.1:{reward.port}",
                    "base_models": [{"name": "arith"}],
                    "drain_s": 60,
                }
            )
        )
        yield path


@contextlib.asynccontextmanager
async def started(config: Path):
    """A process, killed at the end unless it has ended."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.coordinator",
        "--config",
        str(config),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@contextlib.asynccontextmanager
async def running(config: Path):
    """A process that serves, and its address."""
    async with started(config) as process:
        while (line := json.loads(await process.stderr.readline()))["message"] != "serving":
            pass
        yield process, f"127.0.0.1:{line['port']}"


async def test_a_mistake_in_the_configuration_is_one_line_and_exit_status_2(config):
    config.write_text(config.read_text().replace("trainers:", "trainer:"))
    async with started(config) as process:
        _, said = await process.communicate()
    assert process.returncode == 2
    assert said.decode().startswith(f"{config}: ")
    assert "trainer: unknown key; did you mean 'trainers'?" in said.decode()
    assert said.count(b"\n") == 1


async def test_a_database_that_is_away_is_waited_for_and_said_so(config):
    values = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**values, "database": "postgresql://u@127.0.0.1:1/x"}))
    async with started(config) as process:
        said = json.loads(await process.stderr.readline())
        assert (
            "waits for the database: the coordinator's database does not answer" in said["message"]
        )
        process.terminate()
        _, rest = await process.communicate()
    assert b"Traceback" not in rest


async def test_a_database_file_that_cannot_be_opened_is_told_and_exit_status_1(config, tmp_path):
    values = yaml.safe_load(config.read_text())
    (tmp_path / "folder").mkdir()
    config.write_text(yaml.safe_dump({**values, "database": f"sqlite:///{tmp_path}/folder"}))
    async with started(config) as process:
        _, said = await process.communicate()
    assert process.returncode == 1
    assert b"the coordinator's database does not answer" in said
    assert b"Traceback" not in said


async def test_it_serves_all_its_services_and_on_sigterm_sends_watchers_away_and_ends_well(config):
    async with running(config) as (process, address), channel(address) as opened:
        health = health_pb2_grpc.HealthStub(opened)
        for service in ("", *SERVICES):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(opened)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in stub.ServerReflectionInfo(iter([asked])):
            names = {service.name for service in answer.list_services_response.service}
            assert set(SERVICES) < names
            break
        jobs = JobClient(opened)
        await jobs.create(PROJECT, spec_of(), "j")
        events = jobs.watch(J)
        assert (await anext(events)).number == 1
        process.terminate()
        with pytest.raises(Unavailable, match="going away"):  # and not after drain_s
            await anext(events)
        assert await process.wait() == 0


async def test_what_was_acknowledged_outlives_a_process_that_is_killed(config):
    async with running(config) as (process, address), Client(address) as client:
        job = await client.jobs.create(PROJECT, spec_of(), "j", request_id="r")
        process.kill()
        await process.wait()
    async with running(config) as (_, address), Client(address) as client:
        found = await client.jobs.get(J)
        assert (found.state, found.create_time) == ("PENDING", job.create_time)
        assert (await client.jobs.create(PROJECT, spec_of(), "j", request_id="r")).name == J
        assert (await client.jobs.cancel(J)).last_event == 2
