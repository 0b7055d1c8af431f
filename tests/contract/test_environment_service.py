"""Environments written in Python, over real gRPC and as the process that an author starts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.api.environment.v1.environment_service_pb2_grpc import EnvironmentServiceStub
from rollmesh.chat import Answered, Message, Response, Scored, Task
from rollmesh.client import EnvironmentClient
from rollmesh.environment import Environment, NoMoreActions, serving
from rollmesh.errors import (
    DeadlineExceeded,
    EnvironmentFailed,
    EnvironmentTimeout,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
    Unimplemented,
)
from rollmesh.rpc.channel import channel
from rollmesh.rpc.status import mesh_errors

ROOT = Path(__file__).parents[2]
SERVICE = "rollmesh.api.environment.v1.EnvironmentService"
HIDDEN = "the password is hunter2"


def said(content):
    return Message("assistant", content)


class Game:
    """An environment whose episodes do what the model says."""

    def __init__(self, **options):
        self.environment = Environment("game", version="1", tasks={"train": ["abc"]}, **options)
        self.environment.episode(max_turns=8)(self.play)
        self.environment.score(self.score)
        self.playing = 0
        self.ended = []
        self.changed = asyncio.Condition()

    async def score(self, task, answer):
        await self.obey(answer)
        return Scored(float(len(answer)), {"length": 1.0}, "fine")

    async def play(self, episode):
        await self.change(1)
        how = "cancelled"
        try:
            action = await episode.ask("say")
            while action.content != "end":
                await self.obey(action.content)
                action = await episode.ask(action.content, reward=1)
            how = "well"
        except NoMoreActions:
            how = "half-closed"
            return 5.0
        except Exception:
            how = "failed"
            raise
        else:
            return 2.0
        finally:
            self.ended.append(how)
            await self.change(-1)

    async def obey(self, order):
        if order == "fail":
            raise RuntimeError(HIDDEN)
        if order == "nan":
            raise EnvironmentFailed("nan")
        if order == "hang":
            await asyncio.Event().wait()

    async def change(self, by):
        async with self.changed:
            self.playing += by
            self.changed.notify_all()

    async def until(self, playing):
        async with asyncio.timeout(30), self.changed:
            await self.changed.wait_for(lambda: self.playing == playing)


@contextlib.asynccontextmanager
async def opened_to(*environments, **options):
    async with (
        serving(*environments, **options) as running,
        channel(f"127.0.0.1:{running.port}") as opened,
    ):
        yield opened


@pytest.fixture
async def game():
    return Game()


@pytest.fixture
async def opened(game):
    async with opened_to(game.environment) as opened:
        yield opened


@pytest.fixture
def client(opened):
    return EnvironmentClient(opened)


async def test_an_episode_over_the_wire(client):
    async with client.episode("game", "train-0") as episode:
        assert episode.first == Response((Message("user", "say"),))
        assert await episode.act(said("ü")) == Response((Message("user", "ü"),), 1.0)
        assert await episode.act(said("end")) == Response(reward=2.0, done=True)


async def test_tasks_and_scores_over_the_wire(client):
    (info,) = await client.describe()
    assert (info.name, info.has_score, info.has_episodes) == ("game", True, True)
    tasks, token = await client.list_tasks("game", "train")
    assert (tasks, token) == ([Task("train-0", "train", (Message("user", "abc"),))], "")
    assert await client.get_task("", "train-0") == tasks[0]
    scored = await client.score(
        "game", [Answered(tasks[0], [said(text)]) for text in ("abc", "fail", "")]
    )
    assert scored[0] == Scored(3.0, {"length": 1.0}, "fine")
    assert scored[1].failure
    assert HIDDEN not in scored[1].failure
    assert scored[2].reward == 0.0


async def test_health_and_reflection_are_there(opened):
    for service in ("", SERVICE):
        response = await health_pb2_grpc.HealthStub(opened).Check(
            health_pb2.HealthCheckRequest(service=service)
        )
        assert response.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(opened)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    listed = await stub.ServerReflectionInfo(iter([request])).read()
    assert SERVICE in {service.name for service in listed.list_services_response.service}


async def read_all(call):
    with mesh_errors():
        while await call.read() is not grpc.aio.EOF:
            pass


async def begin_for_ever(client):
    while True:
        async with client.episode("reverse", "train-0"):
            pass


# --- how episodes end ----------------------------------------------------------------------------


async def test_a_client_that_leaves_an_episode_ends_it_at_once(game, client):
    async with client.episode("game", "train-0"):
        await game.until(1)
    await game.until(0)
    assert game.ended == ["cancelled"]


async def test_a_caller_that_is_cancelled_ends_its_episode(game, client):
    async def hang():
        async with client.episode("game", "train-0") as episode:
            await episode.act(said("hang"))

    task = asyncio.ensure_future(hang())
    await game.until(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await game.until(0)
    assert game.ended == ["cancelled"]


async def test_a_connection_that_breaks_ends_all_its_episodes(game):
    async with serving(game.environment) as running:
        broken = channel(f"127.0.0.1:{running.port}")
        client = EnvironmentClient(broken)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(20):
                await stack.enter_async_context(client.episode("game", "train-0"))
            await game.until(20)
            await broken.close()
            await game.until(0)
        assert game.ended == ["cancelled"] * 20


async def test_a_deadline_that_passes_ends_the_episode_on_both_sides(game, opened):
    call = EnvironmentServiceStub(opened).Episode(timeout=0.5)
    await call.write(pb.EpisodeRequest(start=pb.Start(task_id="train-0")))
    with pytest.raises(DeadlineExceeded):
        await read_all(call)
    await game.until(0)
    assert set(game.ended) <= {"cancelled"}  # Where the machine is busy it may not have begun.


async def test_a_client_that_gives_up_hears_what_the_episode_was_worth(game, client):
    async with client.episode("game", "train-0") as episode:
        await episode.act(said("x"))
        assert await episode.give_up() == Response(reward=5.0, done=True, truncated=True)
    assert game.ended == ["half-closed"]


async def test_an_answer_that_takes_too_long_is_a_timeout_and_ends_the_episode(game, client):
    async with client.episode("game", "train-0", answer_s=0.3) as episode:
        with pytest.raises(EnvironmentTimeout):
            await episode.act(said("hang"))
    await game.until(0)
    assert game.ended == ["cancelled"]


async def test_what_the_authors_code_raises_is_in_the_log_and_not_on_the_wire(client, caplog):
    with caplog.at_level(logging.ERROR):
        async with client.episode("game", "train-0") as episode:
            with pytest.raises(InternalError) as caught:
                await episode.act(said("fail"))
    assert HIDDEN not in f"{caught.value}{caught.value.context}"
    assert HIDDEN in caplog.text


async def test_a_failure_that_the_author_tells_arrives_as_one(client):
    async with client.episode("game", "train-0") as episode:
        with pytest.raises(EnvironmentFailed, match=r"^nan$"):
            await episode.act(said("nan"))


async def test_no_task_is_left_of_episodes_however_they_end(game, opened, client):
    await client.describe()
    before = len(asyncio.all_tasks())
    for _ in range(20):
        async with client.episode("game", "train-0") as episode:
            assert (await episode.act(said("end"))).done
            while not episode._call.done():  # The server ends the stream by itself.
                await asyncio.sleep(0.001)
        async with client.episode("game", "train-0"):
            pass
    await game.until(0)
    async with asyncio.timeout(30):
        while len(asyncio.all_tasks()) > before:
            await asyncio.sleep(0.01)


# --- what is refused -----------------------------------------------------------------------------

START = pb.EpisodeRequest(start=pb.Start(task_id="train-0"))


@pytest.mark.parametrize(
    ("requests", "error"),
    [
        ([pb.EpisodeRequest(action=pb.Message(role="assistant"))], InvalidRequest),
        ([pb.EpisodeRequest()], InvalidRequest),
        ([pb.EpisodeRequest(start=pb.Start(task_id="no-such"))], NotFound),
        ([pb.EpisodeRequest(start=pb.Start(task_id="train-0", seed=-1))], InvalidRequest),
        ([pb.EpisodeRequest(start=pb.Start(environment="no", task_id="train-0"))], NotFound),
        ([START, START], InvalidRequest),
        ([START, pb.EpisodeRequest()], InvalidRequest),
        ([START, pb.EpisodeRequest(action=pb.Message(role="user"))], InvalidRequest),
        ([START, pb.EpisodeRequest(action=pb.Message(role="nobody"))], InvalidRequest),
    ],
)
async def test_a_stream_of_wrong_messages_is_refused(game, opened, requests, error):
    call = EnvironmentServiceStub(opened).Episode()
    for request in requests:
        await call.write(request)
    with pytest.raises(error):
        await read_all(call)
    await game.until(0)


async def test_bytes_that_are_no_message_are_an_error_and_the_server_goes_on(opened, client):
    for first in ([], [START.SerializeToString()]):
        call = opened.stream_stream(f"/{SERVICE}/Episode")(iter([*first, b"\xff" * 32]))
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in call:
                pass
    assert await client.describe()


async def test_one_episode_too_many_is_told_when_to_try_again():
    game = Game(max_concurrent_episodes=3)
    async with opened_to(game.environment) as opened, contextlib.AsyncExitStack() as stack:
        client = EnvironmentClient(opened)
        for _ in range(3):
            await stack.enter_async_context(client.episode("game", "train-0"))
        with pytest.raises(Overloaded) as caught:
            async with client.episode("game", "train-0"):
                pass
        assert caught.value.retry_after_s > 0
        await stack.aclose()
        await game.until(0)
        async with client.episode("game", "train-0"):
            pass


@pytest.mark.long
async def test_more_episodes_than_grpc_takes_by_itself_begin_at_once(game, client):
    async def begin():
        async with client.episode("game", "train-0") as episode:
            return episode.first

    num_episodes = (
        3_500  # The server refuses at random from the thousandth on, all from the 3,000th.
    )
    begun = await asyncio.gather(*(begin() for _ in range(num_episodes)), return_exceptions=True)
    assert begun == [Response((Message("user", "say"),))] * num_episodes
    await game.until(0)


async def test_what_an_environment_does_not_offer_is_unimplemented():
    async def play(episode):
        await episode.ask("?")

    single = Environment("single", version="1", tasks={"train": ["a"]})
    single.score(lambda task, answer: 1.0)
    multi = Environment("multi", version="1", tasks={"train": ["a"]})
    multi.episode(max_turns=1)(play)
    async with opened_to(single, multi) as opened:
        client = EnvironmentClient(opened)
        assert [info.name for info in await client.describe()] == ["single", "multi"]
        with pytest.raises(Unimplemented):
            await client.score("multi", [Answered(Task("x"), [said("x")])])
        with pytest.raises(Unimplemented):
            async with client.episode("single", "train-0"):
                pass


# --- traces --------------------------------------------------------------------------------------


async def test_an_episode_is_in_the_trace_of_who_plays_it():
    seen = []

    async def play(episode):
        seen.append(trace.get_current_span().get_span_context().trace_id)
        await episode.ask("?")

    traced = Environment("traced", version="1", tasks={"train": ["a"]})
    traced.episode(max_turns=1)(play)
    tracer = TracerProvider().get_tracer("test")
    async with opened_to(traced) as opened:
        with tracer.start_as_current_span("job.group") as span:
            async with EnvironmentClient(opened).episode("traced", "train-0"):
                pass
    assert seen == [span.get_span_context().trace_id]


# --- the end -------------------------------------------------------------------------------------


async def test_episodes_that_outlast_the_drain_end_unavailable_as_the_contract_says(game):
    async with contextlib.AsyncExitStack() as stack:
        server = contextlib.AsyncExitStack()
        running = await server.enter_async_context(serving(game.environment))
        opened = await stack.enter_async_context(channel(f"127.0.0.1:{running.port}"))
        call = EnvironmentServiceStub(opened).Episode()
        await call.write(START)
        await call.read()
        await server.aclose()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await game.until(0)
        assert game.ended == ["cancelled"]


AUTHORS = """
from rollmesh.environment import Environment, Task, serve

reverse = Environment("reverse", version="1", tasks={"train": ["abc"]})

@reverse.score
def score(task: Task, answer: str) -> float:
    return float(answer == task.messages[0].content[::-1])

@reverse.episode(max_turns=2)
async def play(episode):
    await episode.ask("?")

serve(reverse)
"""


@contextlib.asynccontextmanager
async def process(tmp_path, *arguments):
    script = tmp_path / "reverse.py"
    script.write_text(AUTHORS)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(script),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_authors_process_says_where_it_listens_and_drains_when_told(tmp_path, number):
    async with process(tmp_path, "--listen", "127.0.0.1:0", "--drain-s", "30") as started:
        line = (await started.stdout.readline()).decode()
        assert line.startswith("listening on 127.0.0.1:")
        async with channel(line.split()[-1]) as opened:
            client = EnvironmentClient(opened)
            task = await client.get_task("reverse", "train-0")
            (scored,) = await client.score("reverse", [Answered(task, [said("cba")])])
            assert scored.reward == 1.0
            async with client.episode("reverse", "train-0") as episode:
                started.send_signal(number)
                with pytest.raises(Unavailable):
                    await begin_for_ever(client)
                # The one that was under way goes on.
                assert (await episode.act(said("x"))).done
        assert await started.wait() == 0
        assert await started.stdout.read() == b""


async def test_an_authors_process_that_cannot_listen_says_why(tmp_path):
    async with process(tmp_path, "--listen", "203.0.113.1:1") as started:
        assert await started.wait() == 1
        assert b"error: cannot listen at 203.0.113.1:1" in await started.stderr.read()
