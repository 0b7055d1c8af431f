"""The reward service's way to environments, served over gRPC as the service does it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollmesh.api.environment.v1.environment_service_pb2_grpc import (
    add_EnvironmentServiceServicer_to_server,
)
from rollmesh.chat import Answered, Message, Task
from rollmesh.client import EnvironmentClient
from rollmesh.rpc.channel import channel
from rollmesh.rpc.server import serving
from services.reward.assembly import routing
from services.reward.environment_servicer import SERVICE, EnvironmentServicer
from services.reward.environments.config import EnvironmentConfig

if TYPE_CHECKING:
    import grpc

    from rollmesh.rpc.server import Serving
    from services.reward.environments.router import Router


@dataclass
class Routed:
    """A router that is served: its own address, a client of it, and the core."""

    port: int
    channel: grpc.aio.Channel
    client: EnvironmentClient
    router: Router
    running: Serving

    def status(self, name="game"):
        return next(each for each in self.router.list_environments() if each.name == name)

    async def serves(self, name="game", num_serving=1):
        await until(lambda: self.status(name).num_serving >= num_serving)


def environment(*ports, name="game", **changes):
    """The configuration of an environment at ports of this machine."""
    places = [f"127.0.0.1:{port}" for port in ports]
    values = {"name": name, "addresses": places, "remote_name": "game", **changes}
    return EnvironmentConfig.parse(values, source="test")


@contextlib.asynccontextmanager
async def routed(*configs, here=()):
    """The environments of `configs`, over one address."""
    async with (
        routing(configs, here) as router,
        serving(
            lambda server: add_EnvironmentServiceServicer_to_server(
                EnvironmentServicer(router), server
            ),
            services=[SERVICE],
        ) as running,
        channel(f"127.0.0.1:{running.port}") as opened,
    ):
        await running.ready()
        yield Routed(running.port, opened, EnvironmentClient(opened), router, running)


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def say(text):
    return Message("assistant", text)


def answers(*texts):
    return [Answered(Task(f"t{number}"), [say(text)]) for number, text in enumerate(texts)]
