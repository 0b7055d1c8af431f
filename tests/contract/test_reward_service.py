"""The reward service over gRPC, in process and as the process that an operator starts."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rollmesh.api.reward.v1 import reward_service_pb2 as pb
from rollmesh.api.reward.v1.reward_service_pb2_grpc import (
    RewardServiceStub,
    add_RewardServiceServicer_to_server,
)
from rollmesh.client import RewardClient
from rollmesh.errors import InvalidRequest
from rollmesh.rpc.channel import channel
from rollmesh.rpc.server import serving
from rollmesh.rpc.status import to_error
from rollmesh.types import ScoreItem
from services.reward.functions import FUNCTIONS
from services.reward.registry import Registry
from services.reward.servicer import RewardServicer
from services.reward.workers import Workers

ROOT = Path(__file__).parents[2]
SERVICE = "rollmesh.api.reward.v1.RewardService"


@pytest.fixture
async def reward_channel():
    async with (
        Workers(count=1, item_timeout_s=0.3) as workers,
        serving(
            lambda server: add_RewardServiceServicer_to_server(
                RewardServicer(Registry(FUNCTIONS, workers, max_batches=8)), server
            ),
            services=[SERVICE],
        ) as running,
        channel(f"127.0.0.1:{running.port}") as opened,
    ):
        yield opened


@pytest.fixture
def client(reward_channel):
    return RewardClient(reward_channel)


@pytest.mark.parametrize(
    ("function", "parameters", "item", "reward"),
    [
        ("exact_match", {"ignore_case": True}, ScoreItem("Yes", "yes"), 1.0),
        ("numeric_match", {"tolerance": 0.5}, ScoreItem("about 7.4", "7"), 1.0),
        ("math_match", {}, ScoreItem(r"\boxed{\frac12}", "0.5"), 1.0),
        ("regex_match", {"pattern": "^a"}, ScoreItem("ba"), 0.0),
        ("length", {"target": 4}, ScoreItem("abc"), 0.75),
    ],
)
async def test_every_function_scores_over_the_wire(client, function, parameters, item, reward):
    assert await client.score(function, parameters, [item]) == [reward]


async def test_the_functions_and_their_schemas_are_listed(client):
    infos = await client.list_functions()
    assert [info.name for info in infos] == sorted(FUNCTIONS)
    assert all(json.loads(info.parameters_schema_json)["type"] == "object" for info in infos)


async def test_a_batch_is_refused_by_the_name_of_what_is_wrong_with_it(client):
    with pytest.raises(InvalidRequest, match="did you mean 'exact_match'") as caught:
        await client.score("exact_mach", {}, [ScoreItem("x")])
    assert caught.value.context["field"] == "function"


async def test_a_parameter_that_is_not_a_number_is_the_callers_error(reward_channel):
    parameters = Struct()
    parameters["tolerance"] = float("nan")
    request = pb.ScoreRequest(
        function="numeric_match",
        parameters=parameters,
        items=[pb.ScoreItem(completion="7", reference="7")],
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await RewardServiceStub(reward_channel).Score(request)
    assert isinstance(to_error(caught.value), InvalidRequest)


async def test_an_exploding_batch_ends_and_others_are_scored_meanwhile(client):
    exploding = asyncio.ensure_future(
        client.score("regex_match", {"pattern": "(a+)+$"}, [ScoreItem("a" * 60 + "b")])
    )
    assert await client.score("exact_match", {}, [ScoreItem("7", "7")]) == [1.0]
    with pytest.raises(InvalidRequest, match=r"items\[0\].*processor time"):
        await exploding


async def start(config: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.reward",
        "--config",
        str(config),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_a_mistake_in_the_configuration_is_one_line_and_exit_status_2(tmp_path):
    config = tmp_path / "reward.yaml"
    config.write_text("lisen: 127.0.0.1:0\n")
    process = await start(config)
    _, said = await process.communicate()
    assert process.returncode == 2
    assert said.decode() == f"{config}: lisen: unknown key; did you mean 'listen'?\n"


async def test_a_port_that_is_taken_is_one_line_and_exit_status_1(tmp_path):
    config = tmp_path / "reward.yaml"
    async with serving(lambda _: None, services=[]) as other:
        config.write_text(f"listen: 127.0.0.1:{other.port}\n")
        process = await start(config)
        _, said = await process.communicate()
    assert process.returncode == 1
    assert said.decode().splitlines()[-1].startswith(f"cannot listen at 127.0.0.1:{other.port}: ")
    assert "Traceback" not in said.decode()


async def test_the_process_serves_then_drains_on_sigterm_and_ends_well(tmp_path):
    config = tmp_path / "reward.yaml"
    config.write_text("listen: 127.0.0.1:0\ndrain_s: 60\n")
    process = await start(config)
    try:
        line = json.loads(await process.stderr.readline())
        assert line["message"] == "serving"
        async with channel(f"127.0.0.1:{line['port']}") as opened:
            for service in ("", SERVICE):
                health = await health_pb2_grpc.HealthStub(opened).Check(
                    health_pb2.HealthCheckRequest(service=service)
                )
                assert health.status == health_pb2.HealthCheckResponse.SERVING
            client = RewardClient(opened)
            # Seconds of work, and then a small call to know that it has begun when the end comes.
            work = asyncio.ensure_future(
                client.score("math_match", {}, [ScoreItem("1/2", "0.5")] * 400)
            )
            await client.score("math_match", {}, [ScoreItem("1/2", "0.5")])
            process.terminate()
            assert await work == [1.0] * 400
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
