"""The gateway's HTTP server: its connections."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import httpx
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from services.gateway.server import serving


def connections_of(port: int) -> list[socket.socket]:
    """Copies of this process's own ends of connections to `port`."""
    found = []
    for number in [int(path.name) for path in list(Path("/proc/self/fd").iterdir())]:
        try:
            copy = socket.socket(fileno=os.dup(number))
        except OSError:
            continue  # no socket, or the listing's own, which is closed by now
        try:
            copy.getpeername()
            mine = copy.family == socket.AF_INET and copy.getsockname()[1] == port
        except OSError:
            mine = False  # it listens
        if mine:
            found.append(copy)
        else:
            copy.close()
    return found


async def test_the_body_of_an_answer_waits_for_no_acknowledgement_of_its_head():
    delays = []

    async def look(request):
        for connection in connections_of(request.url.port):
            with connection:
                delays.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        return PlainTextResponse("here")

    application = Starlette(routes=[Route("/", look)])
    async with serving(application, "127.0.0.1:0") as port, httpx.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.1:{port}/")).text == "here"
    assert delays == [1]
