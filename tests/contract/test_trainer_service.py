"""The trainer over gRPC, in process and as the process that an operator starts."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rollmesh import convert
from rollmesh.api.common.v1 import tensor_pb2, training_pb2
from rollmesh.api.trainer.v1 import trainer_service_pb2 as pb
from rollmesh.api.trainer.v1.trainer_service_pb2_grpc import (
    TrainerServiceStub,
    add_TrainerServiceServicer_to_server,
)
from rollmesh.client import TrainerClient
from rollmesh.digest import safetensors_digest
from rollmesh.errors import (
    AlreadyExists,
    CapacityExhausted,
    FailedPrecondition,
    InvalidRequest,
    NonFinite,
    NotFound,
    SequenceGap,
)
from rollmesh.rpc.channel import EXPORT_CHUNK_BYTES, channel
from rollmesh.rpc.server import serving
from rollmesh.rpc.status import to_error
from rollmesh.types import AdamConfig, AdapterExport, LoraConfig, LossConfig
from services.trainer.adapters import Adapters
from services.trainer.engine import Engine
from services.trainer.model import Model
from services.trainer.servicer import TrainerServicer
from tests.fakes.tiny_qwen3 import MAX_LENGTH, TARGETS, VOCAB_SIZE, batch, tiny_adapters, tiny_qwen3

ROOT = Path(__file__).parents[2]
SERVICE = "rollmesh.api.trainer.v1.TrainerService"
A, B, C = (f"projects/p/adapters/{letter}" for letter in "abc")
LORA = LoraConfig(4, seed=5)
SAMPLED = LossConfig("importance_sampling", 0.1)
ADAM = AdamConfig(1e-2)


class Gate:
    """Stands before each pass over the model; open unless closed."""

    def __init__(self):
        self.reached = threading.Event()
        self.open = threading.Event()
        self.open.set()

    def wait(self, *_):
        self.reached.set()
        self.open.wait()


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
async def trainer_channel(gate):
    module = tiny_qwen3()
    module.register_forward_pre_hook(gate.wait)
    adapters = Adapters(
        Model(module, max_batch_tokens=256),
        base_model="tiny",
        max_rank=1024,
        max_adapters=2,
        kept_versions=2,
    )
    engine = Engine(max_queued_ops=8)
    async with (
        serving(
            lambda server: add_TrainerServiceServicer_to_server(
                TrainerServicer(adapters, engine), server
            ),
            services=[SERVICE],
        ) as running,
        channel(f"127.0.0.1:{running.port}") as opened,
    ):
        yield opened
        gate.open.set()
    engine.close()


@pytest.fixture
def client(trainer_channel):
    return TrainerClient(trainer_channel)


@pytest.fixture
def stub(trainer_channel):
    return TrainerServiceStub(trainer_channel)


async def train(client, name, steps):
    for step in range(steps):
        await client.forward_backward(name, 2 * step + 1, batch((4, 9), seed=step), SAMPLED)
        await client.optim_step(name, 2 * step + 2, ADAM)
    return await client.publish_adapter(name)


async def exported(client, name, version):
    return [part async for part in client.export_adapter(name, version)]


async def test_the_trainer_tells_what_it_serves(client):
    await client.create_adapter(A, LORA)
    info = await client.get_trainer()
    assert (info.base_model, info.vocab_size, info.max_length) == ("tiny", VOCAB_SIZE, MAX_LENGTH)
    assert (info.max_rank, info.num_adapters, info.max_adapters) == (1024, 1, 2)
    assert set(info.target_modules) == set(TARGETS)


async def test_a_life_over_the_wire_gives_the_bits_of_the_core(client):
    core = tiny_adapters()
    assert await client.create_adapter(A, LORA) == core.create(A, LORA)
    data = batch((4, 9, 6))
    result = await client.forward_backward(A, 1, data, SAMPLED)
    expected = core.forward_backward(A, 1, data, SAMPLED)
    assert result.metrics == expected.metrics
    for found, wanted in zip(result.logprobs, expected.logprobs, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert await client.get_adapter(A) == core.get(A)
    assert await client.optim_step(A, 2, ADAM) == core.optim_step(A, 2, ADAM)
    for found, wanted in zip(await client.forward(A, data), core.forward(A, data), strict=True):
        np.testing.assert_array_equal(found, wanted)
    published = await client.publish_adapter(A)
    assert published == core.publish(A)
    header, *chunks, digest = await exported(client, A, 1)
    assert header == core.version(A, 1).header
    assert b"".join(chunks) == core.version(A, 1).file
    assert digest == published.digest
    await client.delete_adapter(A)
    with pytest.raises(NotFound):
        await client.get_adapter(A)


async def test_an_export_comes_in_chunks_of_bounded_size_between_header_and_digest(client):
    await client.create_adapter(A, LoraConfig(1024))
    published = await client.publish_adapter(A)
    header, *chunks, digest = await exported(client, A, 0)
    assert isinstance(header, AdapterExport)
    assert len(chunks) > 1
    assert max(map(len, chunks)) <= EXPORT_CHUNK_BYTES
    assert sum(map(len, chunks)) == header.num_bytes
    assert safetensors_digest(b"".join(chunks)) == digest == published.digest


async def test_tenants_that_train_at_once_get_the_bits_that_they_get_alone(client):
    loras = {A: LORA, B: LoraConfig(2, target_modules=("q_proj",), seed=9)}
    for name, lora in loras.items():
        await client.create_adapter(name, lora)
    found = await asyncio.gather(*(train(client, name, 3) for name in loras))
    alone = tiny_adapters()
    for (name, lora), published in zip(loras.items(), found, strict=True):
        alone.create(name, lora)
        for step in range(3):
            alone.forward_backward(name, 2 * step + 1, batch((4, 9), seed=step), SAMPLED)
            alone.optim_step(name, 2 * step + 2, ADAM)
        assert published == alone.publish(name)


async def test_an_op_whose_caller_goes_away_is_applied_once_and_answers_the_retry(client, gate):
    await client.create_adapter(A, LORA)
    data = batch((4, 9))
    gate.open.clear()
    call = asyncio.ensure_future(client.forward_backward(A, 1, data, SAMPLED))
    await asyncio.to_thread(gate.reached.wait)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    gate.open.set()
    retried = await client.forward_backward(A, 1, data, SAMPLED)
    step = await client.optim_step(A, 2, ADAM)
    core = tiny_adapters()
    core.create(A, LORA)
    assert retried.metrics == core.forward_backward(A, 1, data, SAMPLED).metrics
    assert step == core.optim_step(A, 2, ADAM)


async def test_reads_do_not_wait_for_an_op_that_runs(client, gate):
    await client.create_adapter(A, LORA)
    await client.publish_adapter(A)
    gate.open.clear()
    call = asyncio.ensure_future(client.forward_backward(A, 1, batch((4,)), SAMPLED))
    await asyncio.to_thread(gate.reached.wait)
    assert (await client.get_adapter(A)).next_sequence == 1
    assert (await client.get_trainer()).num_adapters == 1
    assert len(await exported(client, A, 0)) == 3
    gate.open.set()
    await call
    assert (await client.get_adapter(A)).next_sequence == 2


def wild(data):
    return [replace(data[0], sampling_logprobs=np.full(4, -1e4, np.float32)), *data[1:]]


@pytest.mark.parametrize(
    ("ask", "error", "context"),
    [
        pytest.param(
            lambda client: client.create_adapter(B, LoraConfig(0)),
            InvalidRequest,
            {"field": "lora.rank", "value": "0"},
            id="rank 0",
        ),
        pytest.param(
            lambda client: client.create_adapter(A, LoraConfig(2)),
            AlreadyExists,
            {"resource": A},
            id="another of that name",
        ),
        pytest.param(
            lambda client: client.create_adapter(C, LORA),
            CapacityExhausted,
            {"allowed": "2"},
            id="no room",
        ),
        pytest.param(
            lambda client: client.forward(C, batch((3,))), NotFound, {"resource": C}, id="unknown"
        ),
        pytest.param(
            lambda client: client.forward_backward(A, 1, batch((MAX_LENGTH + 1,)), SAMPLED),
            InvalidRequest,
            {"field": "data[0].token_ids"},
            id="too long",
        ),
        pytest.param(
            lambda client: client.forward_backward(A, 1, wild(batch((4, 4))), SAMPLED),
            NonFinite,
            {"field": "data[0]"},
            id="infinite loss",
        ),
        pytest.param(
            lambda client: client.forward_backward(A, 7, batch((4,)), SAMPLED),
            SequenceGap,
            {"expected_sequence": "1"},
            id="gap",
        ),
        pytest.param(
            lambda client: client.optim_step(A, 1, AdamConfig(float("nan"))),
            InvalidRequest,
            {"field": "adam.learning_rate"},
            id="NaN learning rate",
        ),
        pytest.param(
            lambda client: client.optim_step(A, 1, ADAM),
            FailedPrecondition,
            {"resource": A},
            id="no gradients",
        ),
        pytest.param(
            lambda client: exported(client, A, 3), NotFound, {"value": "3"}, id="not published"
        ),
    ],
)
async def test_an_error_reaches_its_caller_with_what_it_is_about(client, ask, error, context):
    for name in (A, B):
        await client.create_adapter(name, LORA)
    before = await client.get_adapter(A)
    with pytest.raises(error) as caught:
        await ask(client)
    assert type(caught.value) is error
    assert context.items() <= caught.value.context.items()
    assert await client.get_adapter(A) == before
    await client.forward_backward(A, 1, batch((4,)), SAMPLED)


def with_tensor(name, tensor):
    message = convert.datum_to_pb(batch((4,))[0])
    getattr(message, name).CopyFrom(tensor)
    return pb.ForwardBackwardRequest(
        adapter=A,
        sequence=1,
        data=[convert.datum_to_pb(batch((4,))[0]), message],
        loss_config=convert.loss_to_pb(SAMPLED),
    )


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        pytest.param(
            with_tensor("weights", convert.tensor_to_pb([1, 1, 1, 1], "<i4")),
            "data[1].weights.dtype",
            id="integers for floats",
        ),
        pytest.param(
            with_tensor(
                "token_ids",
                tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_INT32, shape=[4], data=b"\0" * 15),
            ),
            "data[1].token_ids",
            id="torn bytes",
        ),
        pytest.param(
            with_tensor("advantages", tensor_pb2.Tensor()), "data[1].advantages.dtype", id="no type"
        ),
        pytest.param(
            pb.ForwardBackwardRequest(
                adapter=A, sequence=1, loss_config=training_pb2.LossConfig(loss="LOSS_UNSPECIFIED")
            ),
            "loss_config.loss",
            id="no loss",
        ),
    ],
)
async def test_a_message_that_says_nothing_sensible_is_the_callers_error(
    client, stub, request_, field
):
    await client.create_adapter(A, LORA)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ForwardBackward(request_)
    error = to_error(caught.value)
    assert isinstance(error, InvalidRequest)
    assert error.context["field"] == field
    assert (await client.get_adapter(A)).next_sequence == 1


# --- the process ---------------------------------------------------------------------------------


async def start(folder, **values):
    config = folder / "trainer.yaml"
    config.write_text(yaml.safe_dump(values))
    return config, await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.trainer",
        "--config",
        str(config),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_a_mistake_in_the_configuration_is_one_line_and_exit_status_2(tmp_path):
    config, process = await start(tmp_path, base_model={"name": "tiny"}, max_rnak=8)
    _, said = await process.communicate()
    assert process.returncode == 2
    assert said.decode() == f"{config}: max_rnak: unknown key; did you mean 'max_rank'?\n"


async def test_a_base_model_that_is_not_there_is_one_line_and_exit_status_2(tmp_path):
    values = {"name": "tiny", "path": str(tmp_path / "nowhere")}
    _, process = await start(tmp_path, base_model=values, listen="127.0.0.1:0")
    _, said = await process.communicate()
    assert process.returncode == 2
    assert said.decode().count("\n") == 1
    assert said.decode().startswith(f"base_model.path: cannot load '{tmp_path}/nowhere': ")


async def test_the_process_serves_then_drains_on_sigterm_and_ends_well(tmp_path):
    tiny_qwen3().save_pretrained(tmp_path / "tiny")
    _, process = await start(
        tmp_path,
        base_model={"name": "tiny", "path": str(tmp_path / "tiny")},
        listen="127.0.0.1:0",
        num_threads=1,
        max_batch_tokens=64,
    )
    try:
        line = json.loads(await process.stderr.readline())
        assert (line["message"], line["service"]) == ("serving", "trainer")
        async with channel(f"127.0.0.1:{line['port']}") as opened:
            for service in ("", SERVICE):
                health = await health_pb2_grpc.HealthStub(opened).Check(
                    health_pb2.HealthCheckRequest(service=service)
                )
                assert health.status == health_pb2.HealthCheckResponse.SERVING
            client = TrainerClient(opened)
            await client.create_adapter(A, LORA)
            # Ops that are under way and waiting when the end comes.
            calls = [
                asyncio.ensure_future(
                    client.forward_backward(A, sequence, batch((9,) * 100), SAMPLED)
                )
                for sequence in (1, 2)
            ]
            # The second of these is sent, and so accepted, after the ops.
            for _ in range(2):
                await client.get_adapter(A)
            process.terminate()
            results = await asyncio.gather(*calls)
        assert {result.metrics["num_tokens"] for result in results} == {600}
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
