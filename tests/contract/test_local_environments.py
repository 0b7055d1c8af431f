"""Authors' programs under the mesh: started, reached, started again at the same address, ended."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

import pytest

from rollmesh.client import EnvironmentClient
from rollmesh.errors import Unavailable
from rollmesh.rpc.channel import channel
from services.local.config import LocalEnvironment
from services.local.mesh import _reserved_port, environment
from services.local.probes import environment_serves, until_serving
from services.local.processes import processes
from tests.fakes.games import Game, served_plainly
from tests.fakes.routing import environment as routed_environment
from tests.fakes.routing import routed, until

ROOT = Path(__file__).parents[2]


@contextlib.asynccontextmanager
async def running(tmp_path, *command, said=None):
    """An environment that is kept running, and its address."""
    (tmp_path / "logs").mkdir()
    config = LocalEnvironment.parse({"name": "game", "command": command}, source="test")
    with _reserved_port() as port:
        address = f"127.0.0.1:{port}"
        async with processes() as started, asyncio.TaskGroup() as tasks:
            say = (said if said is not None else []).append
            kept = environment("environment-game", config, address, tmp_path, started, say)
            task = tasks.create_task(kept.keep_running())
            try:
                yield kept, port
            finally:
                if not task.cancelling():
                    task.cancel()
                await asyncio.wait([task])


async def test_a_program_is_reached_and_again_at_its_address_after_it_died(tmp_path, monkeypatch):
    # `python` is the one that runs us, whatever the search path says.
    monkeypatch.setenv("PATH", "/nowhere:/bin:/usr/bin")
    async with running(tmp_path, "python", "-m", "tests.fakes.games") as (kept, port):
        await kept.serving.wait()
        async with routed(routed_environment(port)) as world:
            await world.serves()
            first = kept.pid
            kept.kill()
            await until(lambda: not world.status().serving)
            await kept.serving.wait()
            await world.serves()
            assert kept.pid != first
    assert kept.program.log.read_text().count(f"listening on 127.0.0.1:{port}") == 2


async def test_a_program_that_does_not_take_its_address_is_given_up_with_what_it_said(tmp_path):
    code = "import sys; sys.exit('no option --listen here')"
    with pytest.raises(ExceptionGroup) as raised:
        async with running(tmp_path, sys.executable, "-c", code) as (kept, _):
            await kept.serving.wait()
    (error,) = raised.value.exceptions
    assert isinstance(error, Unavailable)
    assert "no option --listen here" in str(error)


async def test_a_program_without_a_health_service_serves_once_it_describes_itself():
    async with served_plainly(Game()) as port:
        await until_serving(f"127.0.0.1:{port}", environment_serves)
        async with channel(f"127.0.0.1:{port}") as opened:
            assert await EnvironmentClient(opened).describe()
