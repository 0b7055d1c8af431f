"""A gateway that tells its health and nothing else, a program of its own as the real one."""

from __future__ import annotations

import contextlib
import itertools
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from rollmesh.client import HealthClient
from rollmesh.config import from_command_line
from rollmesh.rpc.channel import channel
from services.gateway.config import GatewayConfig

NOT_YET = 2
"""Answers until it serves."""


async def coordinator_serves(config: GatewayConfig) -> bool:
    """Whether the coordinator that it was told of does."""
    async with channel(config.coordinator) as connection:
        return await HealthClient(connection).check()


def app(config: GatewayConfig) -> Starlette:
    """Serves from the third question on, and says at its end whether the coordinator still does."""
    asked = itertools.count()

    async def healthz(request):
        return PlainTextResponse("", status_code=200 if next(asked) >= NOT_YET else 503)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        print("at the end the coordinator serves:", await coordinator_serves(config))
        sys.stdout.flush()

    return Starlette(routes=[Route("/api/v1/healthz", healthz)], lifespan=lifespan)


if __name__ == "__main__":
    told = from_command_line(GatewayConfig, "tests.fakes.gateway")
    host, _, port = told.listen.rpartition(":")
    uvicorn.run(app(told), host=host, port=int(port), log_level="warning")
