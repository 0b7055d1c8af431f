"""An HTTP server for the life of a block."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from typing import TYPE_CHECKING

import uvicorn

from rollmesh.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from starlette.applications import Starlette

BACKLOG = 4096
IDLE_S = 120
"""How long a connection without requests is kept: clients that think between two steps find it."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's own affair."""
        yield


@contextlib.asynccontextmanager
async def serving(
    application: Starlette, address: str, *, drain_s: float = 0.0
) -> AsyncIterator[int]:
    """Serve at `address` (port 0: a free one) until the block ends: the port.

    At the end no more connections are taken, and requests under way get `drain_s` seconds.

    Raises:
        Unavailable: it is not possible to listen at `address`.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, int(port)), family=family, backlog=BACKLOG)
    except OSError as error:
        raise Unavailable(
            f"cannot listen at {address}: {error.strerror}", resource=address
        ) from None
    # Connections inherit it. asyncio would set it only on sockets that say that they are TCP's, and
    # without it the body of an answer waits 40 ms for the client's acknowledgement of its head.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = _Server(
        uvicorn.Config(
            application,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=round(drain_s + 0.5),
        )
    )
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(server.serve(sockets=[listening]))
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            await running


def many_sockets() -> None:
    """Let this process have as many connections as it may: each poll of a client holds one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
