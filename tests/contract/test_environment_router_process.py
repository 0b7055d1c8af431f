"""The reward service as the process that an operator starts, with an environment behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rollmesh.client import EnvironmentClient, RewardClient
from rollmesh.errors import Unavailable
from rollmesh.rpc.channel import channel
from services.reward.environment_servicer import SERVICE
from tests.fakes.games import Game, served
from tests.fakes.routing import answers, say, until

ROOT = Path(__file__).parents[2]


@contextlib.asynccontextmanager
async def reward_process(folder, **values):
    """The process, and its port."""
    config = folder / "reward.yaml"
    config.write_text(yaml.safe_dump({"listen": "127.0.0.1:0", **values}))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.reward", "--config", str(config)),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def port_of(process):
    while True:
        line = json.loads(await process.stderr.readline())
        if line["message"] == "serving":
            return line["port"]


async def test_the_service_tells_of_its_environments_calls_them_and_ends_their_episodes(tmp_path):
    game = Game()
    async with served(game) as there:
        place = f"127.0.0.1:{there.port}"
        environments = [
            {"name": "game", "addresses": [place]},
            {"name": "away", "addresses": ["127.0.0.1:1"], "remote_name": "game"},
        ]
        async with reward_process(tmp_path, environments=environments, drain_s=0.7) as process:
            port = await port_of(process)
            async with channel(f"127.0.0.1:{port}") as opened:
                health = await health_pb2_grpc.HealthStub(opened).Check(
                    health_pb2.HealthCheckRequest(service=SERVICE)
                )
                assert health.status == health_pb2.HealthCheckResponse.SERVING
                reward, client = RewardClient(opened), EnvironmentClient(opened)
                while not (await reward.list_environments())[1].serving:
                    await asyncio.sleep(0.05)
                away, serving = await reward.list_environments()
                assert (away.name, away.serving, away.num_serving) == ("away", False, 0)
                assert away.problem.startswith("127.0.0.1:1: ")
                assert (serving.name, serving.problem, serving.num_replicas) == ("game", "", 1)
                assert [info.name for info in await client.describe()] == ["game"]
                assert (await client.score("game", answers("four")))[0].reward == 4.0
                async with client.episode("game", "t0") as episode:
                    (_, serving) = await reward.list_environments()
                    assert serving.num_running == 1
                    process.terminate()
                    ended = asyncio.Event()
                    episode.on_end(ended.set)
                    await ended.wait()
                    with pytest.raises(Unavailable, match="the reward service is ending"):
                        await episode.act(say("hello"))
                await until(lambda: game.open == 0)
                assert await process.wait() == 0


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"name": "game"}, "environments[0].addresses: required, but absent"),
        (
            {"name": "game", "addresses": ["127.0.0.1:1"], "tls": {"ca_file": "/nothing.pem"}},
            "tls.ca_file: /nothing.pem: No such file or directory",
        ),
    ],
)
async def test_a_mistake_in_an_environment_is_one_line_and_exit_status_2(
    tmp_path, environment, said
):
    async with reward_process(tmp_path, environments=[environment]) as process:
        _, errors = await process.communicate()
        assert process.returncode == 2
        assert said in errors.decode()
        assert "Traceback" not in errors.decode()
