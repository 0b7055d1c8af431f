"""Very many calls at once: none is dropped, and none is told something else than what happened."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from rollmesh.client import EnvironmentClient
from rollmesh.errors import Unavailable
from rollmesh.rpc.channel import channel
from tests.fakes.games import Game, seen, served, served_plainly
from tests.fakes.routing import environment, routed, say


async def test_a_server_drops_none_of_the_calls_that_come_at_once():
    async with served(Game()) as running, channel(f"127.0.0.1:{running.port}") as opened:
        client = EnvironmentClient(opened)
        described = await asyncio.gather(*(client.describe() for _ in range(3000)))
        assert {infos[0].name for infos in described} == {"game"}


@pytest.mark.long
async def test_a_server_of_somebody_else_gets_no_more_at_once_than_it_takes():
    """One of gRPC's own drops calls beyond a thousand that wait."""
    game = Game()
    async with served_plainly(game) as port, routed(environment(port)) as world:
        await world.serves()
        all_there = asyncio.Event()

        async def play():
            async with world.client.episode("game", "t0"):
                if game.open == 2000:
                    all_there.set()
                await all_there.wait()

        async with asyncio.TaskGroup() as playing:
            for _ in range(2000):
                playing.create_task(play())
        assert game.begun == 2000


class Leaving(Game):
    """Ends each episode soon, whatever its caller does just then."""

    async def Episode(self, request_iterator, context):
        await anext(request_iterator)
        await context.write(seen("look"))
        await asyncio.sleep(0.02)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "bye")


async def test_a_call_that_ends_while_something_is_sent_is_unavailable_and_no_bug():
    async with served(Leaving()) as running, channel(f"127.0.0.1:{running.port}") as opened:
        client = EnvironmentClient(opened)

        async def play(number):
            async with client.episode("game", "t0") as episode:
                await asyncio.sleep(0.0002 * number)
                with pytest.raises(Unavailable):
                    await episode.act(say("hello"))

        for _ in range(3):
            async with asyncio.TaskGroup() as playing:
                for number in range(200):
                    playing.create_task(play(number))
