"""Replicas as processes and behind TLS: killed, stalled, exchanged; and many episodes at once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import grpc
import pytest

from rollmesh.errors import EnvironmentUnavailable, InvalidRequest
from services.reward.assembly import connector
from services.reward.environments.addresses import Resolver
from tests.fakes.games import Game, register, served, served_plainly
from tests.fakes.routing import answers, environment, routed, say, until

ROOT = Path(__file__).parents[2]


class GameProcess:
    """A game as a process of its own."""

    def __init__(self, process, port):
        self.process = process
        self.port = port

    def signal(self, number):
        self.process.send_signal(number)

    async def kill(self):
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@contextlib.asynccontextmanager
async def game_processes():
    """Starts processes; at the end none is left."""
    started = []

    async def start(*, port=0, version="1"):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.fakes.games"),
            *("--listen", f"127.0.0.1:{port}", "--version", version),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        line = await process.stdout.readline()
        started.append(GameProcess(process, int(line.rpartition(b":")[2])))
        return started[-1]

    try:
        yield start
    finally:
        for each in started:
            await each.kill()


async def test_a_replica_that_is_killed_ends_its_episodes_at_once_and_serves_when_it_is_back():
    async with game_processes() as start:
        game = await start()
        async with routed(environment(game.port)) as world:
            await world.serves()
            async with (
                world.client.episode("game", "t0") as thinking,
                world.client.episode("game", "t0") as working,
            ):
                answer = asyncio.ensure_future(working.act(say("hang")))
                ended = asyncio.Event()
                thinking.on_end(ended.set)
                await game.kill()
                with pytest.raises(EnvironmentUnavailable):
                    await answer
                await ended.wait()
                with pytest.raises(EnvironmentUnavailable):
                    await thinking.act(say("hello"))
            await until(lambda: not world.status().serving)
            assert f"127.0.0.1:{game.port}: " in world.status().problem
            assert world.status().num_running == 0
            # What comes meanwhile waits for it.
            waiting = asyncio.ensure_future(world.client.score("game", answers("four")))
            await start(port=game.port)
            assert (await waiting)[0].reward == 4.0
            await world.serves()


async def test_a_replica_that_stalls_gets_nothing_more_and_another_takes_its_place():
    async with game_processes() as start:
        stalled, well = await start(), await start()
        async with routed(environment(stalled.port, well.port, patience_s=3)) as world:
            await world.serves(num_serving=2)
            async with contextlib.AsyncExitStack() as held:
                episodes = [
                    await held.enter_async_context(world.client.episode("game", "t0"))
                    for _ in range(4)
                ]
                stalled.signal(signal.SIGSTOP)
                try:
                    await until(lambda: world.status().num_serving == 1)
                    assert f"{stalled.port}: no answer within 1 s" in world.status().problem
                    scored = await asyncio.gather(
                        *(world.client.score("game", answers("four")) for _ in range(8))
                    )
                    assert all(score.reward == 4.0 for (score,) in scored)
                    # Those that had begun at the one that stalls are given up, and only those.
                    said = await asyncio.gather(
                        *(episode.act(say("hello")) for episode in episodes),
                        return_exceptions=True,
                    )
                    given_up = [isinstance(each, EnvironmentUnavailable) for each in said]
                    assert sorted(given_up) == [False, False, True, True]
                finally:
                    stalled.signal(signal.SIGCONT)
                await world.serves(num_serving=2)
            await until(lambda: world.status().num_running == 0)
            await until_none_is_open(world)


async def until_none_is_open(world):
    """Until each of two replicas says that it has no episode under way; they are asked in turns."""
    seen = set()
    async with asyncio.timeout(30):
        while len(seen) < 2:
            counts = (await world.client.get_task("game", "counts")).fields
            if counts["open"] == "0":
                seen.add(counts["pid"])
            await asyncio.sleep(0.02)


async def test_a_replica_that_drains_finishes_what_it_has_and_gets_nothing_more():
    first, second = Game(), Game()
    async with (
        served(first) as one,
        served(second) as two,
        routed(environment(one.port, two.port)) as world,
        contextlib.AsyncExitStack() as held,
    ):
        await world.serves(num_serving=2)
        begin = partial(world.client.episode, "game", "t0")
        episodes = [await held.enter_async_context(begin()) for _ in range(2)]
        assert (first.open, second.open) == (1, 1)
        await one.not_ready()
        await until(lambda: world.status().num_serving == 1)
        for _ in range(3):
            await held.enter_async_context(begin())
        assert (first.open, second.open) == (1, 4)
        for episode in episodes:
            assert (await episode.act(say("done"))).done


async def test_a_server_without_a_health_service_serves_as_long_as_it_answers():
    game = Game()
    async with served_plainly(game) as port, routed(environment(port)) as world:
        await world.serves()
        assert (await world.client.score("game", answers("four")))[0].reward == 4.0
        game.tried.clear()
        await until(lambda: game.tried["Describe"] > 2)


async def test_a_replica_that_is_too_full_after_all_is_waited_for():
    game = Game(max_concurrent_episodes=1)
    async with served(game) as there, routed(environment(there.port)) as world:
        await world.serves()
        # Somebody else is there.
        async with routed(environment(there.port)) as other:
            await other.serves()
            async with other.client.episode("game", "t0"):
                begun = asyncio.ensure_future(one_episode(world))
                await until(lambda: world.status().num_waiting == 1)
            await begun


async def one_episode(world, name="game"):
    async with world.client.episode(name, "t0") as episode:
        await episode.act(say("done"))


async def test_a_wait_for_one_environment_holds_up_no_other():
    busy, free = Game(), Game()
    async with (
        served(busy) as one,
        served(free) as two,
        routed(
            environment(one.port, max_concurrent=1), environment(two.port, name="free")
        ) as world,
    ):
        await world.serves()
        await world.serves("free")
        async with world.client.episode("game", "t0"):
            waiting = asyncio.ensure_future(one_episode(world))
            await until(lambda: world.status().num_waiting == 1)
            await one_episode(world, "free")
            assert not waiting.done()
        await waiting


async def test_names_are_looked_up():
    with Resolver() as resolve:
        assert await resolve("10.1.2.3:7") == ["10.1.2.3:7"]
        assert await resolve("[::1]:7") == ["[::1]:7"]
        assert await resolve("localhost:7") == ["127.0.0.1:7"]
    async with served(Game()) as one, served(Game()) as two:
        names = [f"localhost:{one.port}", f"dns:///localhost:{two.port}"]
        async with routed(environment(addresses=names)) as world:
            await world.serves(num_serving=2)


async def test_a_name_that_leads_nowhere_is_said_with_the_reason():
    async with routed(environment(addresses=["nowhere.invalid:7"])) as world:
        await until(lambda: "nowhere.invalid:7: the name leads nowhere" in world.status().problem)
        assert world.status().num_replicas == 1


@pytest.mark.long
async def test_a_thousand_episodes_at_once_leave_nothing_behind():
    game = Game()
    async with served(game) as there, routed(environment(there.port)) as world:
        await world.serves()
        await one_episode(world)
        tasks = len(asyncio.all_tasks())
        all_there = asyncio.Event()

        async def play(number):
            async with world.client.episode("game", "t0", seed=number) as episode:
                assert episode.first.observation[0].content == f"seed {number}"
                if game.open == 1000:
                    all_there.set()
                await all_there.wait()
                said = await episode.act(say(f"{number}"))
                assert said.observation[0].content == f"you said {number}"
                if number % 2:
                    await episode.act(say("done"))

        async with asyncio.TaskGroup() as playing:
            for number in range(1000):
                playing.create_task(play(number))
        assert game.most_open == 1000
        await until(lambda: game.open == world.status().num_running == 0)
        gc.collect()
        await until(lambda: len(asyncio.all_tasks()) <= tasks + 5)


# --- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A CA, and what it has signed for a server called game.example and for a client."""
    folder = tmp_path_factory.mktemp("certificates")
    make = """
set -e
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 \
    -subj /CN=ca -keyout ca.key -out ca.pem
for name in game.example client; do
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
        -subj /CN=$name -keyout $name.key -out $name.csr
    printf "subjectAltName=DNS:$name" > $name.ext
    openssl x509 -req -in $name.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
        -extfile $name.ext -out $name.pem
done
"""
    subprocess.run(  # noqa: S603 - what is above
        ["/bin/sh", "-c", make], cwd=folder, check=True, capture_output=True
    )
    return folder


@contextlib.asynccontextmanager
async def served_with_tls(game, folder):
    server = grpc.aio.server()
    register(game)(server)
    pair = (folder / "game.example.key").read_bytes(), (folder / "game.example.pem").read_bytes()
    ca = (folder / "ca.pem").read_bytes()
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([pair], ca, require_client_auth=True)
    )
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


def tls_of(folder, *lacking):
    tls = {
        "ca_file": folder / "ca.pem",
        "certificate_file": folder / "client.pem",
        "key_file": folder / "client.key",
        "server_name": "game.example",
    }
    return {key: value for key, value in tls.items() if key not in lacking}


async def test_an_environment_is_reached_by_tls_both_ways(certificates):
    async with (
        served_with_tls(Game(), certificates) as port,
        routed(environment(port, tls=tls_of(certificates))) as world,
    ):
        await world.serves()
        await one_episode(world)


@pytest.mark.parametrize(
    "lacking", [["server_name"], ["ca_file"], ["certificate_file", "key_file"], ["tls"]]
)
async def test_without_one_part_of_its_tls_an_environment_is_not_reached(certificates, lacking):
    tls = None if lacking == ["tls"] else tls_of(certificates, *lacking)
    async with (
        served_with_tls(Game(), certificates) as port,
        routed(environment(port, tls=tls)) as world,
    ):
        await until(lambda: "UNAVAILABLE" in world.status().problem)
        assert not world.status().serving


def test_a_file_of_the_tls_that_is_not_there_is_named(tmp_path):
    config = environment(1, tls={"ca_file": tmp_path / "nothing.pem"})
    with pytest.raises(InvalidRequest, match=r"nothing\.pem: No such file") as raised:
        connector(config.tls)
    assert raised.value.context["field"] == "tls.ca_file"
