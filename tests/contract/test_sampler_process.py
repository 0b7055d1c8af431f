"""The sampler as the process that an operator starts, and how it ends."""

from __future__ import annotations

import asyncio
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rollmesh.client import SamplerClient
from rollmesh.rpc.channel import channel
from rollmesh.types import SamplingParams, join_chunks
from tests.contract.sampler_process import ROOT, alive, sampler_process
from tests.contract.sampler_world import BASE_MODEL, fake_trainer, make_world, trainer_logprobs

SERVICE = "rollmesh.api.sampler.v1.SamplerService"
PROMPT = [5, 6, 12, 7, 3]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


async def health(address: str) -> str:
    async with grpc.aio.insecure_channel(address) as opened:
        response = await health_pb2_grpc.HealthStub(opened).Check(
            health_pb2.HealthCheckRequest(service=SERVICE)
        )
    return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


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


@pytest.fixture
async def bfloat16(world, tmp_path):
    """vLLM as it runs at work: in bfloat16, which uses AMX where there is any."""
    values = {
        "base_model": {"name": BASE_MODEL, "path": str(world.model)},
        "backend": "vllm",
        "dtype": "bfloat16",
        "num_threads": 1,
        "max_rank": 16,
        "kv_cache_memory": "128MiB",
    }
    async with sampler_process(tmp_path, values) as sampler:
        yield sampler


async def test_in_bfloat16_the_trainer_agrees_until_a_kill_that_takes_the_engine_along(
    world, bfloat16
):
    params = SamplingParams(seed=1, max_tokens=100, ignore_eos=True)
    assert await health(bfloat16.address) == "SERVING"
    async with channel(bfloat16.address) as opened, fake_trainer(world) as trainer:
        for version in range(2):
            chunks = SamplerClient(opened).sample(
                trainer.source(version), PROMPT, 1, params, project="p"
            )
            completion = join_chunks([chunk async for chunk in chunks])
            expected = trainer_logprobs(world, version, PROMPT, completion.token_ids, "bfloat16")
            # Eight bits of precision.
            assert completion.logprobs == pytest.approx(expected, abs=0.1)
    family = bfloat16.family()
    assert len(family) > 2
    bfloat16.process.kill()
    await bfloat16.process.wait()
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
        sampler_process(tmp_path, values) as sampler,
        channel(sampler.address) as opened,
    ):
        params = SamplingParams(seed=1, max_tokens=200, ignore_eos=True)
        chunks = SamplerClient(opened).sample(None, PROMPT, 2, params, project="p")
        first = await anext(chunks)
        assert await health(sampler.address) == "SERVING"
        assert not (await SamplerClient(opened).get_sampler()).draining
        sampler.process.terminate()
        # It says so while it works on: the coordinator asks others, and does not give this one up.
        async with asyncio.timeout(30):
            while not (await SamplerClient(opened).get_sampler()).draining:
                await asyncio.sleep(0.01)
        assert await health(sampler.address) == "NOT_SERVING"
        received = [first, *[chunk async for chunk in chunks]]
        assert sum(len(chunk.token_ids) for chunk in received) == 400
        assert await sampler.process.wait() == 0
        assert not list(sampler.cache.iterdir())
