"""`rollmesh environment` as a person or a script runs it, against servers over real gRPC."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from rollmesh.cli.__main__ import main
from rollmesh.environment import Environment, serving, task_of
from rollmesh.environment.conformance import RULES
from tests.fakes.environments import LIMIT, Parrot, served

ROOT = Path(__file__).parents[2]


@pytest.fixture
def rollmesh(monkeypatch, capsys):
    """Runs a command: its exit status, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")

    def run():
        try:
            main()
        except SystemExit as ended:
            return ended.code or 0
        return 0

    async def rollmesh(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["rollmesh", "environment", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = await asyncio.to_thread(run)
        return status, *capsys.readouterr()

    return rollmesh


class SaysNaN(Parrot):
    def worth(self, item):
        scored = super().worth(item)
        scored.reward = float("nan")
        return scored


# --- check ---------------------------------------------------------------------------------------


async def test_check_prints_a_verdict_for_each_rule_and_succeeds_where_none_fails(rollmesh):
    async with served(Parrot()) as port:
        status, output, errors = await rollmesh(
            "check", f"127.0.0.1:{port}", "--episodes", str(LIMIT)
        )
    assert status == 0
    for rule in RULES:
        assert rule.name in output
    assert f"parrot: {len(RULES) - 2} passed, 0 failed, 2 skipped" in output
    assert "parrot passed health" in errors  # Each as soon as it is reached.


async def test_check_says_why_a_rule_fails_and_fails(rollmesh):
    async with served(SaysNaN()) as port:
        status, output, _ = await rollmesh("check", f"127.0.0.1:{port}", "--episodes", "4")
    assert status == 1
    assert "scores failed reward of item 0 is nan" in " ".join(output.split())
    assert "rules make no sense without scores" in output
    assert "1 failed" in output


async def test_check_tells_programs_all(rollmesh):
    async with served(SaysNaN()) as port:
        status, output, errors = await rollmesh(
            "check", f"127.0.0.1:{port}", "--episodes", "4", "--json"
        )
    assert (status, errors) == (1, "")
    (report,) = json.loads(output)["environments"]
    assert report["environment"] == "parrot"
    assert [verdict["rule"] for verdict in report["verdicts"]] == [rule.name for rule in RULES]
    (failed,) = [verdict for verdict in report["verdicts"] if verdict["outcome"] == "failed"]
    assert (failed["rule"], failed["reason"]) == ("scores", "reward of item 0 is nan")


async def test_a_server_that_is_not_there_is_an_error_in_a_line(rollmesh):
    async with served(Parrot()) as port:
        pass
    for command in (["check", "--answer-s", "0.5"], ["describe"], ["play"]):
        status, output, errors = await rollmesh(*command, f"127.0.0.1:{port}")
        assert (status, output) == (1, "")
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1


# --- describe and play ---------------------------------------------------------------------------


async def test_describe_tells_what_there_is(rollmesh):
    async with served(Parrot()) as port:
        _, output, _ = await rollmesh("describe", f"127.0.0.1:{port}")
        _, as_json, _ = await rollmesh("describe", f"127.0.0.1:{port}", "--json")
    for told in ("parrot", "single turns, episodes", "train (7 tasks)", "say", '"count"'):
        assert told in output
    assert json.loads(as_json)["environments"][0]["limits"]["max_concurrent_episodes"] == LIMIT


async def test_an_episode_is_played_at_the_terminal(rollmesh):
    async with served(Parrot()) as port:
        status, output, _ = await rollmesh(
            "play",
            f"127.0.0.1:{port}",
            "--seed",
            "7",
            stdin='no\n/call say {"text": "x"}\na\na\n',
        )
    assert status == 0
    assert output.split("\n") == [
        "task train/0, seed 7",
        'tools: say; call one with /call NAME {"argument": "value"}',
        "user: say a",
        "> user: more 7",
        "> tool: said",
        "> user: more 7",
        "  (reward 1)",
        "> user: more 7",
        "  (reward 1, done)",
        "the episode is worth 2",
        "",
    ]


async def test_who_stops_playing_hears_what_it_was_worth(rollmesh):
    async with served(Parrot()) as port:
        _, output, _ = await rollmesh("play", f"127.0.0.1:{port}", stdin="a\n")
    assert output.endswith("  (reward 0.5, done)\nthe episode is worth 1.5\n")


async def test_a_single_turn_is_answered_at_the_terminal(rollmesh):
    reverse = Environment("reverse", version="1", tasks={"train": [task_of("a\x1b[2Jb")]})
    reverse.score(lambda task, answer: float(answer == "ba"))
    async with serving(reverse) as running:
        address = f"127.0.0.1:{running.port}"
        _, output, _ = await rollmesh("play", address, "--task", "train-0", stdin="ba\n")
        assert "\x1b" not in output
        assert output.endswith("> the answer is worth 1\n")
        status, _, errors = await rollmesh("play", address, "--task", "nope")
        assert status == 1
        assert "no task 'nope'" in errors


async def test_of_several_environments_one_has_to_be_named(rollmesh):
    one, two = (Environment(name, version="1", tasks={"t": ["a"]}) for name in ("one", "two"))
    for each in (one, two):
        each.score(lambda task, answer: 1.0)
    async with serving(one, two) as running:
        address = f"127.0.0.1:{running.port}"
        status, _, errors = await rollmesh("play", address, stdin="x\n")
        assert (status, "one, two" in errors) == (2, True)
        status, output, _ = await rollmesh("play", address, "--environment", "two", stdin="x\n")
        assert (status, "worth 1" in output) == (0, True)
        status, _, errors = await rollmesh("check", address, "--environment", "three")
        assert (status, "one, two" in errors) == (1, True)


# --- serve ---------------------------------------------------------------------------------------


async def test_a_spec_that_is_none_is_a_usage_error(rollmesh):
    status, _, errors = await rollmesh("serve", "atari:Pong")
    assert status == 2
    assert "is none of gymnasium" in errors


@pytest.mark.skipif(
    importlib.util.find_spec("gymnasium") is None, reason="gymnasium is not installed"
)
async def test_serve_serves_an_environment_of_gymnasium_until_told_to_end(rollmesh):
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "rollmesh.cli",
        "environment",
        "serve",
        "gymnasium:FrozenLake-v1",
        "--tasks",
        "3",
        "--max-turns",
        "5",
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        address = (await process.stdout.readline()).decode().split()[-1]
        _, output, _ = await rollmesh("describe", address)
        assert "train (3 tasks)" in output
        assert "5 actions of an episode" in output
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_the_help_imports_no_grpc():
    code = "import sys, rollmesh.cli.__main__; sys.exit('grpc' in sys.modules)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert await process.wait() == 0
