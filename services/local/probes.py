"""Whether a member serves, asked until it does: gRPC of most, HTTP of the gateway."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from rollmesh.client import EnvironmentClient, HealthClient
from rollmesh.errors import MeshError, NotFound, Unimplemented
from rollmesh.rpc.channel import channel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import grpc

INTERVAL_S = 0.2
TIMEOUT_S = 5.0
HEALTH_PATH = "/api/v1/healthz"
"""Of the gateway: status 200 while it serves."""


async def member_serves(connection: grpc.aio.Channel) -> bool:
    """Whether one of our own servers does."""
    return await HealthClient(connection).check()


async def environment_serves(connection: grpc.aio.Channel) -> bool:
    """Whether an author's server does, which need not tell its health."""
    try:
        return await member_serves(connection)
    except (NotFound, Unimplemented):
        return bool(await EnvironmentClient(connection).describe())


async def until_serving(
    address: str, serves: Callable[[grpc.aio.Channel], Awaitable[bool]] = member_serves
) -> None:
    """Return once the gRPC server at `address` serves."""
    async with channel(address) as connection:
        while True:
            with contextlib.suppress(MeshError, TimeoutError):
                async with asyncio.timeout(TIMEOUT_S):
                    if await serves(connection):
                        return
            await asyncio.sleep(INTERVAL_S)


async def until_http_serves(address: str) -> None:
    """Return once the HTTP server at `address` answers HEALTH_PATH with 200."""
    while True:
        # ValueError: what is there says too much and is no HTTP server.
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(TIMEOUT_S):
                if await _http_status(address) == b"200":
                    return
        await asyncio.sleep(INTERVAL_S)


async def _http_status(address: str) -> bytes:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    try:
        request = f"GET {HEALTH_PATH} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
        writer.write(request.encode())
        return (await reader.readline()).partition(b" ")[2][:3]
    finally:
        writer.close()
