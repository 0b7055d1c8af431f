"""How every server of the mesh is made: health, reflection, errors, traces, graceful drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection
from opentelemetry.instrumentation.grpc import aio_server_interceptor

from rollmesh.errors import Unavailable
from rollmesh.rpc.channel import KEEPALIVE_S, KEEPALIVE_TIMEOUT_S, MESSAGE_OPTIONS
from rollmesh.rpc.interceptors import ErrorInterceptor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

MAX_PENDING = 32_768
"""Calls that have come and are not yet taken up; those beyond are refused."""
MAX_PENDING_S = 300
"""Seconds after which such a call is refused."""

log = logging.getLogger(__name__)


class Serving:
    """A server that runs. It is NOT_SERVING until `ready`."""

    def __init__(
        self,
        port: int,
        server: grpc.aio.Server,
        health: health_aio.HealthServicer,
        services: Sequence[str],
    ) -> None:
        self.port = port
        self._server = server
        self._health = health
        self._services = ("", *services)
        self._is_ready = False
        self._is_paused = False

    async def ready(self) -> None:
        """Report SERVING: from now on calls are welcome."""
        self._is_ready = True
        await self._report()

    async def not_ready(self) -> None:
        """Report NOT_SERVING: calls already here go on."""
        self._is_ready = False
        await self._report()

    async def pause(self, paused: bool) -> None:  # noqa: FBT001 - what a callback hears
        """Report NOT_SERVING although it is ready, or no longer so; calls are answered as ever."""
        if paused != self._is_paused:
            self._is_paused = paused
            await self._report()

    async def stop(self, drain_s: float) -> None:
        """Take no more calls; those under way get `drain_s` seconds to finish."""
        await self.not_ready()
        await self._server.stop(drain_s)

    async def _report(self) -> None:
        answer = health_pb2.HealthCheckResponse
        for service in self._services:
            # Another report may come in between.
            serves = self._is_ready and not self._is_paused
            await self._health.set(service, answer.SERVING if serves else answer.NOT_SERVING)


@contextlib.asynccontextmanager
async def serving(
    register: Callable[[grpc.aio.Server], None],
    *,
    services: Sequence[str],
    address: str = "127.0.0.1:0",
    drain_s: float = 0.0,
) -> AsyncIterator[Serving]:
    """Serve what `register` adds at `address` (port 0: a free one) until the block ends.

    `services` are the full names, for health and reflection. At the end calls under way get
    `drain_s` seconds to finish; then they are cancelled.

    Raises:
        Unavailable: it is not possible to listen at `address`.
    """
    server = grpc.aio.server(
        # Traces outermost, so that a span sees the status which the error interceptor makes.
        interceptors=[aio_server_interceptor(), ErrorInterceptor()],
        # Two servers must never share a port by accident: the kernel would split the calls.
        options=[
            *MESSAGE_OPTIONS,
            ("grpc.so_reuseport", 0),
            # Channels ping every KEEPALIVE_S; gRPC's own server hangs up on more than one in 5 min.
            ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_S * 500),
            # gRPC refuses calls at random from the thousandth on that nobody has taken up yet, and
            # forgets those that wait for 30 s: as many episodes as a job has may begin at once.
            ("grpc.server.max_pending_requests", MAX_PENDING),
            ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING),
            ("grpc.server_max_unrequested_time_in_server", MAX_PENDING_S),
            # A client that lost its power would hold its streams, and all that they stand for.
            ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
            # The one above goes by what the kernel has heard, this one by what the process answers.
            ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
        ],
    )
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection(
        (
            *services,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        ),
        server,
    )
    register(server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:  # which does not say why
        raise Unavailable(
            f"cannot listen at {address}: the port is taken, or the host is not this machine",
            resource=address,
        ) from None
    running = Serving(port, server, health, services)
    await running.not_ready()
    await server.start()
    try:
        yield running
    finally:
        await running.stop(drain_s)


async def terminated() -> None:
    """Return when the process is told to end (SIGTERM, SIGINT)."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    await told.wait()
    log.info("draining")
