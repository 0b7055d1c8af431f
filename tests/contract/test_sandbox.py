"""Which sandbox a service has, that it proves itself, and what is left when the service dies."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from rollmesh.client import RewardClient
from rollmesh.errors import FailedPrecondition, Unavailable
from rollmesh.rpc.channel import channel
from rollmesh.types import ScoreItem
from services.reward.config import SandboxConfig
from services.reward.sandbox import Limits, Program, Sandbox, sandbox
from services.reward.sandbox.choice import TOOLS
from services.reward.sandbox.limits import OUT_OF_MEMORY, ended
from services.reward.sandbox.measure import start_s
from services.reward.sandbox.runtime import runtime
from services.reward.sandbox.self_test import weakness
from services.reward.sandbox.tools import Bubblewrap, Command
from tests.fakes.sandboxes import first_tool, processes_of, until_gone

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made():
    with runtime() as made:
        yield made


@pytest.fixture
def tool(made):
    return first_tool(made)


async def test_auto_takes_one_that_there_is(tool):
    async with sandbox(SandboxConfig()) as chosen:
        assert str(chosen) in TOOLS
        assert (await chosen.run(Program({"main.py": b"print(1)"}))).stdout == b"1\n"


async def test_none_is_none():
    async with sandbox(SandboxConfig(tool="none")) as chosen:
        assert chosen == "its configuration has sandbox.tool: none"


@pytest.fixture
def bare(monkeypatch):
    """A machine without either tool: nothing on the path, no package."""
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)


async def test_where_there_is_none_auto_says_what_to_install(bare):
    async with sandbox(SandboxConfig()) as chosen:
        assert isinstance(chosen, str)
        assert "bubblewrap needs `bwrap`: install Debian's package bubblewrap" in chosen
        assert "nsjail needs `nsjail`" in chosen


@pytest.mark.parametrize("name", TOOLS)
async def test_one_that_is_named_and_not_there_is_an_error(bare, name):
    with pytest.raises(FailedPrecondition, match=f"sandbox.tool: {name} cannot be used: .*install"):
        async with sandbox(SandboxConfig(tool=name)):
            pass


class Loose(Bubblewrap):
    """bubblewrap with options changed."""

    def __init__(self, made, change):
        super().__init__(made)
        self.change = change

    @contextlib.contextmanager
    def command(self, user, limits, control, python):
        with super().command(user, limits, control, python) as command:
            arguments = list(command.arguments)
            self.change(arguments)
            yield Command(arguments, command.inherited)


def without(*options):
    """Leaves out options that take one value."""

    def change(arguments):
        for option in options:
            at = arguments.index(option)
            del arguments[at : at + 2]

    return change


def with_the_hosts_files(arguments):
    arguments[arguments.index("--ro-bind") + 1] = "/"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        pytest.param(without("--seccomp"), "opens a socket", id="no filter"),
        pytest.param(without("--uid", "--gid"), "is user", id="another user"),
        pytest.param(with_the_hosts_files, "sees", id="the host's files"),
    ],
)
async def test_the_self_test_finds_what_is_missing(made, change, found):
    try:
        loose = Loose(made, change)
    except FailedPrecondition as missing:
        pytest.skip(str(missing))
    assert found in await weakness(Sandbox(loose, max_runs=1))


async def test_a_sandbox_that_does_not_come_up_says_why(made, tool):
    class Broken:
        name = tool.name

        def command(self, user, limits, control, python):
            return contextlib.nullcontext(
                Command(["/bin/sh", "-c", "echo broken >&2; exit 1"], [control])
            )

    with pytest.raises(Unavailable, match=f"{tool.name} made no sandbox: broken"):
        await Sandbox(Broken(), max_runs=1).run(Program({"main.py": b""}))


@pytest.mark.parametrize(
    ("code", "seconds", "expected"),
    [
        (0, 0, ("exited", 0)),
        (1, 0, ("exited", 1)),
        (128, 0, ("exited", 128)),
        (OUT_OF_MEMORY, 0, ("memory", 0)),
        (128 + signal.SIGXCPU, 0, ("time", 0)),
        (128 + signal.SIGKILL, 0.5, ("signal", 9)),
        (128 + signal.SIGKILL, 3, ("time", 0)),
        (128 + signal.SIGSEGV, 3, ("signal", 11)),
    ],
)
def test_how_a_program_ended_is_read_from_its_exit_status(code, seconds, expected):
    assert ended(code, seconds, Limits(cpu_s=2)) == expected


def test_the_runtime_is_readable_for_all_and_gone_in_the_end():
    with runtime() as made:
        folders = [made.folder, *(path for path in made.root.rglob("*") if path.is_dir())]
        assert all(folder.stat().st_mode & 0o555 == 0o555 for folder in folders)
        assert not any(path.is_symlink() for path in made.root.rglob("*"))
        names = {path.name for path in made.root.rglob("*")}
        assert not names & {"site-packages", "dist-packages", "pip"}
    assert not made.folder.exists()


def test_what_a_killed_service_left_is_swept_away_and_what_lives_is_not():
    with runtime() as alive:
        left = Path(tempfile.mkdtemp(prefix="rollmesh-sandbox-"))
        (left / "root").mkdir()
        with runtime():
            assert not left.exists()
            assert alive.root.exists()


@pytest.mark.parametrize("kind", TOOLS.values(), ids=TOOLS)
async def test_a_program_ends_with_its_service_however_that_ends(made, kind):
    try:
        tool = kind(made)
    except FailedPrecondition as missing:
        pytest.skip(str(missing))
    script = f"""
import asyncio, os, signal
from pathlib import Path
from services.reward.sandbox import Limits, Program, Sandbox
from services.reward.sandbox.runtime import Runtime
from services.reward.sandbox.tools import {type(tool).__name__}

async def main():
    sandbox = Sandbox({type(tool).__name__}(Runtime(Path({str(made.folder)!r}))), max_runs=1)
    async with sandbox.place() as place:
        program = Program({{"main.py": b"import time; print('on', flush=True); time.sleep(600)"}})
        async with place.start(program, Limits(idle_s=500)) as running:
            print((await running.read_line()).decode(), end="", flush=True)
            await asyncio.sleep(600)

asyncio.run(main())
"""
    service = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert await service.stdout.readline() == b"on\n"
    assert len(processes_of(made.folder)) >= 2
    service.kill()
    await service.wait()
    await until_gone(made.folder)


async def test_the_cost_of_a_start_is_measured(made, tool):
    assert 0 < await start_s(Sandbox(tool, max_runs=1), runs=3) < 60


@pytest.fixture
def public_folder():
    """Where the user of a sandbox may go, whoever the service is."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


async def test_the_service_runs_code_and_dies_without_a_trace(tmp_path, public_folder, tool):
    config = tmp_path / "reward.yaml"
    config.write_text("listen: 127.0.0.1:0\nsandbox: {max_runs: 1}\n")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.reward", "--config", str(config),
        cwd=ROOT, stderr=asyncio.subprocess.PIPE, env={**os.environ, "TMPDIR": str(public_folder)},
    )  # fmt: skip
    try:
        line = json.loads(await process.stderr.readline())
        assert line["sandbox"] in TOOLS
        (folder,) = public_folder.glob("rollmesh-sandbox-*")
        async with channel(f"127.0.0.1:{line['port']}") as opened:
            client = RewardClient(opened)
            items = [ScoreItem(f"def f(): return {n}", "assert f() == 1") for n in (1, 2)]
            assert await client.score("code_tests", {}, items) == [1, 0]
            asleep = ScoreItem("import time\ntime.sleep(600)", "assert f() == 1")
            call = asyncio.ensure_future(client.score("code_tests", {}, [asleep]))
            while not processes_of(folder):
                await asyncio.sleep(0.01)
            process.kill()
            with pytest.raises(Unavailable):
                await call
        await until_gone(folder)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
