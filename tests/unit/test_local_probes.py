"""When an HTTP server is taken to serve: at status 200, and nothing else that may be there."""

from __future__ import annotations

import asyncio

import pytest

from services.local import probes
from services.local.mesh import _reserved_port

ANSWERS = {
    "hangs up": b"",
    "no HTTP": b"\x00\x01 hello\n",
    "no line": b"x" * 200_000,
    "not yet": b"HTTP/1.1 503 Service Unavailable\r\n\r\n",
    "redirected": b"HTTP/1.1 302 Found\r\nlocation: /\r\n\r\n",
}
SERVES = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(probes, "INTERVAL_S", 0.01)
    monkeypatch.setattr(probes, "TIMEOUT_S", 0.5)


async def answering(port, answers, asked):
    """A server that gives one answer after the other; None: none, while the line is open."""

    async def answer(reader, writer):
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        said = answers[len(asked) - 1]
        if said is None:
            await reader.read()
        else:
            writer.write(said)
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", port, reuse_address=True)


@pytest.mark.parametrize("answer", [*ANSWERS.values(), None], ids=[*ANSWERS, "says nothing"])
async def test_it_asks_until_the_answer_is_200(answer):
    asked: list[bytes] = []
    with _reserved_port() as port:
        waiting = asyncio.ensure_future(probes.until_http_serves(f"127.0.0.1:{port}"))
        await asyncio.sleep(0)  # nobody listens yet
        async with await answering(port, [answer, answer, SERVES], asked), asyncio.timeout(30):
            await waiting
    assert len(asked) == 3
    first, host, *_ = asked[0].split(b"\r\n")
    assert first == b"GET /api/v1/healthz HTTP/1.1"
    assert host == f"Host: 127.0.0.1:{port}".encode()
