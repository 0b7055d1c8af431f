"""The sampler as the process that an operator starts, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rollmesh.client import SamplerClient
from rollmesh.rpc.channel import channel
from rollmesh.types import SamplingParams, join_chunks
from tests.contract.sampler_world import BASE_MODEL, fake_trainer, make_world

ROOT = Path(__file__).parents[2]
SERVICE = "rollmesh.api.sampler.v1.SamplerService"
PROMPT = [5, 6, 12, 7, 3]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@dataclass
class Started:
    """A sampler's process, which serves."""

    process: asyncio.subprocess.Process
    address: str
    cache: Path

    def family(self) -> set[int]:
        """The process and all its descendants."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                parents[int(stat.parent.name)] = int(fields[1])
        family = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        return family


async def health(address: str) -> str:
    async with grpc.aio.insecure_channel(address) as opened:
        response = await health_pb2_grpc.HealthStub(opened).Check(
            health_pb2.HealthCheckRequest(service=SERVICE)
        )
    return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


def alive(pids: set[int]) -> set[int]:
    """Those of `pids` that run; what is dead and not yet reaped does not."""
    running = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                running.add(pid)
    return running


@contextlib.asynccontextmanager
async def started(config: Path, values: dict[str, object]):
    """`python -m services.sampler` until it serves; nothing of it is left afterwards."""
    cache = config.with_suffix(".cache")
    cache.mkdir()
    config.write_text(yaml.safe_dump({**values, "listen": "127.0.0.1:0", "cache_dir": str(cache)}))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.sampler",
        "--config",
        str(config),
        cwd=ROOT,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    family: set[int] = set()
    try:
        said = []
        async for line in process.stderr:
            said.append(line.decode())
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if record["message"] == "serving":
                    break
        else:
            pytest.fail("".join(said))
        sampler = Started(process, f"127.0.0.1:{record['port']}", cache)
        family = sampler.family()
        # What it says from now on must not fill the pipe.
        reading = asyncio.ensure_future(process.stderr.read())
        yield sampler
        await reading
    finally:
        for pid in alive(family | {process.pid}):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await process.wait()


async def test_a_mistake_in_the_configuration_is_one_line_and_exit_status_2(tmp_path):
    config = tmp_path / "sampler.yaml"
    config.write_text("base_model: {name: m, path: p}\nmax_lorras: 4\n")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.sampler",
        "--config",
        str(config),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert process.returncode == 2
    assert said.decode() == f"{config}: max_lorras: unknown key; did you mean 'max_loras'?\n"


async def test_a_killed_sampler_takes_its_engine_with_it(world, tmp_path):
    values = {
        "base_model": {"name": BASE_MODEL, "path": str(world.model)},
        "backend": "vllm",
        # Uses AMX where there is any, which needs permission.
        "dtype": "bfloat16",
        "num_threads": 1,
        "max_rank": 16,
        "kv_cache_memory": "128MiB",
    }
    async with (
        started(tmp_path / "sampler.yaml", values) as sampler,
        channel(sampler.address) as opened,
        fake_trainer(world) as trainer,
    ):
        assert await health(sampler.address) == "SERVING"
        chunks = SamplerClient(opened).sample(trainer.source(0), PROMPT, 1, GREEDY)
        completion = join_chunks([chunk async for chunk in chunks])
        expected = world.completion_logprobs(0, PROMPT, completion.token_ids)
        # Eight bits of precision.
        assert completion.logprobs == pytest.approx(expected, abs=0.3)
        family = sampler.family()
        assert len(family) > 2
        sampler.process.kill()
        await sampler.process.wait()
        async with asyncio.timeout(30):
            while alive(family):
                await asyncio.sleep(0.05)


async def test_on_sigterm_the_running_requests_finish_and_nothing_is_left(world, tmp_path):
    values = {
        "base_model": {"name": BASE_MODEL, "path": str(world.model)},
        "backend": "transformers",
        "num_threads": 1,
    }
    async with (
        started(tmp_path / "sampler.yaml", values) as sampler,
        channel(sampler.address) as opened,
    ):
        params = SamplingParams(seed=1, max_tokens=200, ignore_eos=True)
        chunks = SamplerClient(opened).sample(None, PROMPT, 2, params)
        first = await anext(chunks)
        assert await health(sampler.address) == "SERVING"
        sampler.process.terminate()
        received = [first, *[chunk async for chunk in chunks]]
        assert sum(len(chunk.token_ids) for chunk in received) == 400
        assert await sampler.process.wait() == 0
        assert not list(sampler.cache.iterdir())
