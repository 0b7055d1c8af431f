"""Environments of other frameworks, with their real packages, over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import socket
import sys
from pathlib import Path

import pytest

from rollmesh.chat import Answered, Message, Task, ToolCall
from rollmesh.client import EnvironmentClient
from rollmesh.environment import serving
from rollmesh.environment.adapters import adapted, name_of
from rollmesh.environment.conformance import check
from rollmesh.errors import FailedPrecondition, InvalidRequest, Unavailable
from rollmesh.rpc.channel import channel

ROOT = Path(__file__).parents[2]
FAKES = ROOT / "tests" / "fakes"


def needs(package, name):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{name} is not installed"
    )


gymnasium = needs("gymnasium", "gymnasium")
openenv = needs("openenv", "openenv-core")
verifiers = needs("verifiers", "verifiers")


def said(content):
    return Message("assistant", content)


async def made(spec, *, num_tasks=8, max_turns=10):
    # Some ask a server, or run an event loop of their own.
    return await asyncio.to_thread(adapted, spec, num_tasks=num_tasks, max_turns=max_turns)


@contextlib.asynccontextmanager
async def client_of(environment):
    async with (
        serving(environment) as running,
        channel(f"127.0.0.1:{running.port}") as opened,
    ):
        yield EnvironmentClient(opened)


async def conforms(environment, *, num_episodes=20, without=()):
    async with serving(environment) as running:
        (report,) = await check(f"127.0.0.1:{running.port}", answer_s=60, num_episodes=num_episodes)
    failed = [v for v in report.verdicts if v.outcome == "failed" and v.rule not in without]
    assert failed == []


# --- specs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["", "gymnasium", "gymnasium:", "atari:Pong", ":x"])
def test_a_spec_that_is_none_is_refused(spec):
    with pytest.raises(InvalidRequest, match="is none of gymnasium"):
        adapted(spec, num_tasks=1, max_turns=1)


@pytest.mark.parametrize("framework", ["gymnasium", "openenv", "verifiers"])
def test_a_framework_that_is_not_installed_is_named(framework):
    if importlib.util.find_spec(framework) is not None:
        pytest.skip(f"{framework} is installed")
    with pytest.raises(FailedPrecondition, match=r"rollmesh\[environments\]"):
        adapted(f"{framework}:x", num_tasks=1, max_turns=1)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("FrozenLake-v1", "frozenlake-v1"),
        ("ALE/Pong_v5", "ale-pong-v5"),
        ("2048", "e-2048"),
        ("x" * 99, "x" * 63),
        ("a" * 62 + "--b", "a" * 62),
    ],
)
def test_a_name_is_made_to_fit(text, name):
    assert name_of(text) == name


# --- Gymnasium -----------------------------------------------------------------------------------


@gymnasium
async def test_a_gymnasium_environment_is_played_in_words():
    frozen = await made("gymnasium:FrozenLake-v1", max_turns=6)
    async with client_of(frozen) as client, client.episode("frozenlake-v1", "train-0") as episode:
        assert episode.first.observation[0].content == (
            "[S]FFF\nFHFH\nFFFH\nHFFG\nleft, down, right, up?"
        )
        response = await episode.act(said("fly"))
        assert response.observation[0].content == "no such action\nleft, down, right, up?"
        response = await episode.act(said(" Left "))
        assert "(Left)" in response.observation[0].content
        while not response.done:
            response = await episode.act(said("left"))
        assert response.truncated


@gymnasium
@pytest.mark.parametrize("name", ["FrozenLake-v1", "Taxi-v4", "CliffWalking-v1", "Blackjack-v1"])
async def test_a_gymnasium_environment_conforms(name):
    await conforms(await made(f"gymnasium:{name}"))


@gymnasium
async def test_a_task_of_gymnasium_begins_alike_whatever_the_seed():
    taxi = await made("gymnasium:Taxi-v4")
    async with client_of(taxi) as client:

        async def first(task_id, seed):
            async with client.episode("taxi-v4", task_id, seed=seed) as episode:
                return episode.first.observation[0].content

        assert await first("train-0", 1) == await first("train-0", 2)
        shown = {await first(f"train-{n}", 0) for n in range(8)}
        assert len(shown) > 4
        assert not any("\x1b" in text for text in shown)


@gymnasium
@pytest.mark.parametrize(
    ("name", "message"),
    [("NoSuch-v0", "NoSuch"), ("Pendulum-v1", "only Discrete"), ("../x", "x")],
)
async def test_what_cannot_be_told_in_words_is_refused(name, message):
    with pytest.raises(InvalidRequest, match=message):
        await made(f"gymnasium:{name}")


# --- OpenEnv -------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
async def spelling():
    """The URL of a real OpenEnv server."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.fakes.openenv_server",
        str(port),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
            assert process.returncode is None
            await asyncio.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        await process.wait()


@openenv
async def test_an_openenv_server_is_played_in_words(spelling):
    environment = await made(f"openenv:{spelling}")
    async with client_of(environment) as client:
        (info,) = await client.describe()
        assert (info.name, info.version) == ("spelling", "1.0.0")
        async with client.episode("spelling", "train-0") as episode:
            assert episode.first.observation == (Message("user", "3 letters"),)
            assert (await episode.act(said("c"))).reward == 1.0
            assert (await episode.act(said("x"))).reward == 0.0
            response = await episode.act(said('```json\n{"letter": "a"}\n```'))
            assert response.observation[0].content == "ca"
            response = await episode.act(said('{"no-such": 1}'))
            assert (response.reward, response.done) == (0.0, False)
            response = await episode.act(said("t"))
            assert (response.reward, response.done) == (1.0, True)


@openenv
async def test_an_openenv_server_conforms(spelling):
    await conforms(await made(f"openenv:{spelling}"))


@openenv
async def test_an_openenv_server_that_is_not_there_is_unavailable():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(Unavailable, match="no OpenEnv server"):
        await made(f"openenv:{url}")
    with pytest.raises(InvalidRequest):
        await made("openenv:file:///etc/passwd")


# --- verifiers -----------------------------------------------------------------------------------


@pytest.fixture
def tasksets(monkeypatch):
    """The tasksets of tests/fakes can be imported, here and by the processes of their tools."""
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setenv("PYTHONPATH", f"{FAKES}{os.pathsep}{ROOT}")


@verifiers
async def test_a_taskset_of_one_answer_is_a_single_turn(tasksets):
    sums = await made("verifiers:verifiers-sums", num_tasks=20)
    async with client_of(sums) as client:
        (info,) = await client.describe()
        assert (info.has_score, info.has_episodes) == (True, False)
        assert [(split.name, split.num_tasks) for split in info.splits] == [
            ("train", 18),
            ("heldout", 2),
        ]
        task = await client.get_task("verifiers-sums", "train-3")
        assert task.messages == (Message("system", "Add."), Message("user", "3+3"))
        scored = await client.score(
            "verifiers-sums",
            [Answered(task, [*task.messages, said(text)]) for text in ("6", "7", "6 of course")],
        )
        assert [(each.reward, each.rewards) for each in scored] == [
            (1.5, {"right": 1.0, "short": 0.5}),
            (0.5, {"right": 0.0, "short": 0.5}),
            (0.0, {"right": 0.0, "short": 0.0}),
        ]
        (foreign,) = await client.score("verifiers-sums", [Answered(Task("x"), [said("6")])])
        assert foreign.failure


@verifiers
async def test_a_taskset_of_one_answer_conforms(tasksets):
    await conforms(await made("verifiers:verifiers-sums"))


@verifiers
async def test_a_taskset_with_a_tool_is_an_episode(tasksets):
    lookups = await made("verifiers:verifiers-tool")
    async with client_of(lookups) as client:
        (info,) = await client.describe()
        assert (info.has_score, info.has_episodes) == (False, True)
        assert [(tool.name, tool.description) for tool in info.tools] == [
            ("book_look_up", "What a word means.")
        ]
        calls = (
            ToolCall("1", "book_look_up", '{"word": "abc"}'),
            ToolCall("2", "book_look_up", "{"),
            ToolCall("3", "no_such", "{}"),
        )
        async with client.episode("verifiers-tool", "train-0") as episode:
            assert episode.first.observation == (Message("user", "What does abc mean?"),)
            response = await episode.act(Message("assistant", "", calls))
            assert [(m.role, m.tool_call_id, m.content) for m in response.observation] == [
                ("tool", "1", "abc means cba"),
                ("tool", "2", "error: the arguments are no JSON"),
                ("tool", "3", "error: no tool 'no_such', there is book_look_up"),
            ]
            response = await episode.act(said("cba"))
            assert (response.reward, response.rewards, response.done) == (1.0, {"right": 1.0}, True)


@verifiers
async def test_a_game_that_speaks_for_the_user_is_an_episode(tasksets):
    guesses = await made("verifiers:verifiers-guess", max_turns=4)
    async with client_of(guesses) as client:
        async with client.episode("verifiers-guess", "train-0") as episode:
            heard = [episode.first, *[await episode.act(said(each)) for each in ("1", "5", "3")]]
            texts = [message.content for each in heard for message in each.observation]
            assert texts == ["1-9?", "higher", "lower"]
            assert (heard[-1].done, heard[-1].reward) == (True, pytest.approx(1 / 3))
        async with client.episode("verifiers-guess", "train-0") as episode:
            heard = [await episode.act(said("1")) for _ in range(4)]
            assert (heard[-1].done, heard[-1].truncated) == (True, True)


@verifiers
async def test_a_tools_process_ends_with_its_episode(tasksets):
    lookups = await made("verifiers:verifiers-tool")
    async with client_of(lookups) as client:
        async with client.episode("verifiers-tool", "train-0"):
            assert processes()
        async with asyncio.timeout(30):
            while processes():
                await asyncio.sleep(0.1)


def processes():
    """Those of the tool of tests/fakes that this process has started."""
    found = []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_bytes() if path.name.isdigit() else b""
            if b"-m\0verifiers_tool" in command:
                found.append(path.name)
    return found


@verifiers
@pytest.mark.parametrize("name", ["no-such-taskset", "textarena"])
async def test_a_taskset_that_cannot_be_played_is_refused(tasksets, name):
    with pytest.raises(InvalidRequest, match=f"verifiers:{name}"):
        await made(f"verifiers:{name}")
