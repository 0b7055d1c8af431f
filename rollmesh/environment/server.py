"""Serves environments: as the process that an author starts, and for tests."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
from typing import TYPE_CHECKING

from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.api.environment.v1.environment_service_pb2_grpc import (
    add_EnvironmentServiceServicer_to_server,
)
from rollmesh.environment.host import Host
from rollmesh.environment.servicer import EnvironmentServicer
from rollmesh.errors import MeshError
from rollmesh.rpc.server import Serving, terminated
from rollmesh.rpc.server import serving as rpc_serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rollmesh.environment.author import Environment

LISTEN = "127.0.0.1:0"
DRAIN_S = 5.0


def serve(*environments: Environment) -> None:
    """Serve `environments` as the command line says, until told to end (SIGTERM, SIGINT).

    Says `listening on HOST:PORT` on standard output when it serves.
    """
    parser = argparse.ArgumentParser(description="Serve an environment to a Rollmesh.")
    parser.add_argument(
        "--listen", default=LISTEN, metavar="HOST:PORT", help="port 0: a free one (%(default)s)"
    )
    parser.add_argument(
        "--drain-s",
        type=float,
        default=DRAIN_S,
        metavar="S",
        help="seconds that episodes under way get to finish when it is to end (%(default)s)",
    )
    options = parser.parse_args()
    run(*environments, listen=options.listen, drain_s=options.drain_s)


def run(*environments: Environment, listen: str = LISTEN, drain_s: float = DRAIN_S) -> None:
    """As `serve`, without a command line; ends the process where it cannot listen."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

    async def serve_until_told() -> None:
        async with serving(*environments, address=listen, drain_s=drain_s) as running:
            print(f"listening on {listen.rpartition(':')[0]}:{running.port}", flush=True)  # noqa: T201 - what starts it waits for this line
            await terminated()

    try:
        asyncio.run(serve_until_told())
    except MeshError as error:
        sys.exit(f"error: {error}")


@contextlib.asynccontextmanager
async def serving(
    *environments: Environment, address: str = LISTEN, drain_s: float = 0.0
) -> AsyncIterator[Serving]:
    """Serve `environments` at `address` until the block ends; port 0: a free one.

    Then episodes under way get `drain_s` seconds, and those that are left end UNAVAILABLE.

    Raises:
        Unavailable: it is not possible to listen at `address`.
        ValueError: as Host says.
    """
    async with (
        Host(environments) as host,
        rpc_serving(
            lambda server: add_EnvironmentServiceServicer_to_server(
                EnvironmentServicer(host), server
            ),
            services=[pb.DESCRIPTOR.services_by_name["EnvironmentService"].full_name],
            address=address,
            drain_s=drain_s,
        ) as running,
    ):
        await running.ready()
        yield running
