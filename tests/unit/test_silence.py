"""Streams that fall silent, in virtual time; and over a socket, as grpc's own calls do it."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest

from rollmesh.errors import Unavailable
from rollmesh.rpc import silence
from rollmesh.rpc.server import serving
from rollmesh.rpc.silence import unsilenced
from rollmesh.rpc.status import mesh_errors
from rollmesh.types import HEARTBEAT_S, SILENCE_S
from tests.fakes.virtual_time import simulate


class FakeCall:
    """Messages after so many seconds each. Cancelling it cancels who waits, as in grpc.aio."""

    def __init__(self, *pauses):
        self.pauses = pauses
        self.num_cancels = 0
        self._waiting = None

    async def __aiter__(self):
        loop = asyncio.get_running_loop()
        for number, seconds in enumerate(self.pauses):
            self._waiting = loop.create_future()
            timer = loop.call_later(seconds, self._come)
            try:
                await self._waiting
            finally:
                timer.cancel()
            yield number

    def _come(self):
        if not self._waiting.done():
            self._waiting.set_result(None)

    def cancel(self):
        self.num_cancels += 1
        return self._waiting.cancel()


def test_a_stream_that_says_something_in_time_is_told_whole():
    async def scenario():
        call = FakeCall(*[HEARTBEAT_S] * 100, SILENCE_S, SILENCE_S, 0.0)
        assert [message async for message in unsilenced(call)] == list(range(103))
        assert call.num_cancels == 0

    simulate(scenario())


@pytest.mark.parametrize("num_messages", [0, 1, 7])
def test_a_stream_that_is_silent_is_cancelled_and_lost(num_messages):
    async def scenario():
        call = FakeCall(*[0.1] * num_messages, 1000.0)
        came = []

        async def listen():
            async for message in unsilenced(call):
                came.append(message)  # noqa: PERF401 - what had come counts

        with pytest.raises(Unavailable, match=r"nothing came for 1\.5 s"):
            await listen()
        silent_s = asyncio.get_running_loop().time() - 0.1 * num_messages
        assert SILENCE_S <= silent_s < 2
        assert len(came) == num_messages
        assert call.num_cancels == 1

    simulate(scenario())


def test_a_message_that_came_while_the_call_was_cancelled_is_told_and_then_the_loss():
    class Racing(FakeCall):
        async def __aiter__(self):
            self._waiting = asyncio.get_running_loop().create_future()
            with contextlib.suppress(asyncio.CancelledError):
                await self._waiting
            yield "late"
            raise asyncio.CancelledError

    async def scenario():
        came = []

        async def listen():
            async for message in unsilenced(Racing()):
                came.append(message)  # noqa: PERF401 - what had come counts

        with pytest.raises(Unavailable, match=r"nothing came for 1\.5 s"):
            await listen()
        assert came == ["late"]

    simulate(scenario())


def test_a_reader_that_takes_its_time_and_a_loop_that_is_busy_are_not_silence():
    async def scenario():
        call = FakeCall(*[0.9] * 10)
        loop = asyncio.get_running_loop()
        num_messages = 0
        async for _ in unsilenced(call):
            await asyncio.sleep(100)
            loop.busy(100)
            num_messages += 1
        assert num_messages == 10

    simulate(scenario())


def test_a_loop_that_is_busy_while_a_message_is_on_its_way_counts_as_one_tick():
    async def scenario():
        call = FakeCall(*[1.2] * 5)
        loop = asyncio.get_running_loop()

        async def compute():
            while True:
                await asyncio.sleep(0.5)
                loop.busy(30)

        computing = asyncio.ensure_future(compute())
        assert [message async for message in unsilenced(call)] == list(range(5))
        computing.cancel()

    simulate(scenario())


@pytest.mark.parametrize("after_s", [0.5, 1.6, 1.75])
def test_a_reader_that_is_cancelled_is_cancelled_and_hears_of_no_silence(after_s):
    async def scenario():
        call = FakeCall(1000.0)

        async def read():
            async for _ in unsilenced(call):
                pass

        reader = asyncio.ensure_future(read())
        # Before the tick of the same moment: the timer that was set first goes off first.
        asyncio.get_running_loop().call_later(after_s, reader.cancel)
        await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await reader

    simulate(scenario())


def test_nothing_is_left_of_a_stream_that_was_left_in_the_middle():
    async def scenario():
        call = FakeCall(*[0.1] * 10)
        async with contextlib.aclosing(unsilenced(call)) as messages:
            await anext(messages)
        await asyncio.sleep(10)
        assert call.num_cancels == 0

    simulate(scenario())


async def test_a_silent_server_is_unavailable_and_hears_that_it_was_left(monkeypatch):
    monkeypatch.setattr(silence, "SILENCE_S", 0.3)
    monkeypatch.setattr(silence, "HEARTBEAT_S", 0.05)
    left = asyncio.Event()

    async def say_one_thing(request, context):
        try:
            yield b"one"
            await asyncio.Event().wait()
        finally:
            left.set()

    handlers = {"Say": grpc.unary_stream_rpc_method_handler(say_one_thing)}

    def register(server):
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("test.Test", handlers),)
        )

    came = []

    async def listen(channel):
        with mesh_errors():
            async for message in unsilenced(channel.unary_stream("/test.Test/Say")(b"")):
                came.append(message)  # noqa: PERF401 - what had come counts

    async with (
        serving(register, services=[], address="127.0.0.1:0") as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        await server.ready()
        with pytest.raises(Unavailable, match="nothing came"):
            await listen(channel)
        assert came == [b"one"]
        await left.wait()
