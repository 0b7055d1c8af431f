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
from rollmesh.blobs import Blobs
from rollmesh.client import TrainerClient
from rollmesh.digest import safetensors_digest
from rollmesh.errors import (
    AlreadyExists,
    CapacityExhausted,
    DigestMismatch,
    FailedPrecondition,
    Fenced,
    InvalidRequest,
    NonFinite,
    NotFound,
    SequenceGap,
)
from rollmesh.exports import StoredExport
from rollmesh.rpc.channel import EXPORT_CHUNK_BYTES, channel
from rollmesh.rpc.server import serving
from rollmesh.rpc.status import to_error
from rollmesh.types import (
    AdamConfig,
    AdapterExport,
    HeldAdapter,
    LoraConfig,
    LossConfig,
    Snapshot,
)
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
async def trainer_channel(gate, tmp_path):
    module = tiny_qwen3()
    module.register_forward_pre_hook(gate.wait)
    model = Model(module, max_batch_tokens=256)
    blobs = str(tmp_path / "blobs")
    async with (
        tiny_adapters(model, blobs, max_rank=1024, max_adapters=2) as adapters,
        serving(
            lambda server: add_TrainerServiceServicer_to_server(TrainerServicer(adapters), server),
            services=[SERVICE],
        ) as running,
        channel(f"127.0.0.1:{running.port}") as opened,
    ):
        yield opened
        gate.open.set()


@pytest.fixture
def client(trainer_channel):
    return TrainerClient(trainer_channel)


@pytest.fixture
def stub(trainer_channel):
    return TrainerServiceStub(trainer_channel)


async def train(client, name, steps):
    for step in range(steps):
        data = batch((4, 9), seed=step)
        await client.forward_backward(name, 2 * step + 1, data, SAMPLED, epoch=1)
        await client.optim_step(name, 2 * step + 2, ADAM, epoch=1)
    return await client.publish_adapter(name, epoch=1)


def keyless(published):
    """Without the place in the blob store, which is another each time."""
    return replace(published, export_key="")


async def exported(client, name, version, **offset):
    return [part async for part in client.export_adapter(name, version, **offset)]


async def test_the_trainer_tells_what_it_serves(client):
    await client.create_adapter(A, LORA, epoch=1)
    info = await client.get_trainer()
    assert (info.base_model, info.vocab_size, info.max_length) == ("tiny", VOCAB_SIZE, MAX_LENGTH)
    assert (info.max_rank, info.num_adapters, info.max_adapters) == (1024, 1, 2)
    assert (info.instance_id, info.draining) == ("this-one", False)
    assert info.held == (HeldAdapter(A, 1),)
    assert 0 < info.adapter_bytes < info.max_adapter_bytes == 2**30
    assert set(info.target_modules) == set(TARGETS)


def timeless(step):
    """The result of a step, without its times."""
    return replace(step, metrics=without_times(step.metrics))


def without_times(metrics):
    return {name: value for name, value in metrics.items() if name not in {"queued_s", "run_s"}}


async def test_a_life_over_the_wire_gives_the_bits_of_the_core(client):
    data = batch((4, 9, 6))
    async with tiny_adapters() as adapters:
        assert await client.create_adapter(A, LORA, epoch=1) == await adapters.create(
            A, LORA, epoch=1
        )
        core = adapters.get(A)
        result = await client.forward_backward(A, 1, data, SAMPLED, epoch=1)
        expected = await core.forward_backward(1, 1, data, SAMPLED)
        assert without_times(result.metrics) == without_times(expected.metrics)
        for found, wanted in zip(result.logprobs, expected.logprobs, strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert await client.get_adapter(A) == core.view
        stepped = await client.optim_step(A, 2, ADAM, epoch=1)
        assert timeless(stepped) == timeless(await core.optim_step(1, 2, ADAM))
        for options in ({}, {"temperature": 0.5}, {"loss_config": SAMPLED}):
            result = await client.forward(A, data, **options)
            expected = await core.forward(
                data, options.get("temperature"), options.get("loss_config")
            )
            for found, wanted in zip(result.logprobs, expected.logprobs, strict=True):
                np.testing.assert_array_equal(found, wanted)
            assert without_times(result.metrics) == without_times(expected.metrics)
            assert bool(result.metrics) == ("loss_config" in options)
        published = await client.publish_adapter(A, epoch=1)
        assert keyless(published) == keyless(await core.publish(1))
        header, *chunks, digest = await exported(client, A, 1)
        assert header == core.version(1).header
        assert b"".join(chunks) == core.version(1).file
        assert digest == published.digest
    await client.delete_adapter(A, epoch=1)
    with pytest.raises(NotFound):
        await client.get_adapter(A)


async def test_an_export_comes_in_chunks_of_bounded_size_between_header_and_digest(client):
    await client.create_adapter(A, LoraConfig(1024), epoch=1)
    published = await client.publish_adapter(A, epoch=1)
    header, *chunks, digest = await exported(client, A, 0)
    assert isinstance(header, AdapterExport)
    assert len(chunks) > 1
    assert max(map(len, chunks)) <= EXPORT_CHUNK_BYTES
    assert sum(map(len, chunks)) == header.num_bytes
    assert safetensors_digest(b"".join(chunks)) == digest == published.digest


async def test_an_export_goes_on_from_any_of_its_bytes(client):
    await client.create_adapter(A, LoraConfig(1024), epoch=1)
    await client.publish_adapter(A, epoch=1)
    header, *chunks, digest = await exported(client, A, 0)
    file = b"".join(chunks)
    for offset in (0, 1, EXPORT_CHUNK_BYTES, len(file) - 1, len(file)):
        header_again, *rest, digest_again = await exported(client, A, 0, offset=offset)
        assert (header_again, digest_again) == (header, digest)
        assert b"".join(rest) == file[offset:]
        assert all(0 < len(chunk) <= EXPORT_CHUNK_BYTES for chunk in rest)


async def test_tenants_that_train_at_once_get_the_bits_that_they_get_alone(client):
    loras = {A: LORA, B: LoraConfig(2, target_modules=("q_proj",), seed=9)}
    for name, lora in loras.items():
        await client.create_adapter(name, lora, epoch=1)
    found = await asyncio.gather(*(train(client, name, 3) for name in loras))
    async with tiny_adapters() as adapters:
        for (name, lora), published in zip(loras.items(), found, strict=True):
            await adapters.create(name, lora, epoch=1)
            alone = adapters.get(name)
            for step in range(3):
                data = batch((4, 9), seed=step)
                await alone.forward_backward(1, 2 * step + 1, data, SAMPLED)
                await alone.optim_step(1, 2 * step + 2, ADAM)
            assert keyless(published) == keyless(await alone.publish(1))


async def test_an_op_whose_caller_goes_away_is_applied_once_and_answers_the_retry(client, gate):
    await client.create_adapter(A, LORA, epoch=1)
    data = batch((4, 9))
    gate.open.clear()
    call = asyncio.ensure_future(client.forward_backward(A, 1, data, SAMPLED, epoch=1))
    await asyncio.to_thread(gate.reached.wait)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    gate.open.set()
    retried = await client.forward_backward(A, 1, data, SAMPLED, epoch=1)
    step = await client.optim_step(A, 2, ADAM, epoch=1)
    async with tiny_adapters() as adapters:
        await adapters.create(A, LORA, epoch=1)
        core = adapters.get(A)
        expected = await core.forward_backward(1, 1, data, SAMPLED)
        assert without_times(retried.metrics) == without_times(expected.metrics)
        assert timeless(step) == timeless(await core.optim_step(1, 2, ADAM))


async def test_reads_do_not_wait_for_an_op_that_runs(client, gate):
    await client.create_adapter(A, LORA, epoch=1)
    await client.publish_adapter(A, epoch=1)
    gate.open.clear()
    call = asyncio.ensure_future(client.forward_backward(A, 1, batch((4,)), SAMPLED, epoch=1))
    await asyncio.to_thread(gate.reached.wait)
    assert (await client.get_adapter(A)).next_sequence == 1
    assert (await client.get_trainer()).num_adapters == 1
    assert len(await exported(client, A, 0)) == 3
    gate.open.set()
    await call
    assert (await client.get_adapter(A)).next_sequence == 2


async def published_from(client, name, offset):
    await client.publish_adapter(name, epoch=1)
    return await exported(client, name, 0, offset=offset)


def wild(data):
    return [replace(data[0], sampling_logprobs=np.full(4, -1e4, np.float32)), *data[1:]]


@pytest.mark.parametrize(
    ("ask", "error", "context"),
    [
        pytest.param(
            lambda client: client.create_adapter(B, LoraConfig(0), epoch=1),
            InvalidRequest,
            {"field": "lora.rank", "value": "0"},
            id="rank 0",
        ),
        pytest.param(
            lambda client: client.create_adapter(A, LoraConfig(2), epoch=1),
            AlreadyExists,
            {"resource": A},
            id="another of that name",
        ),
        pytest.param(
            lambda client: client.create_adapter(C, LORA, epoch=1),
            CapacityExhausted,
            {"allowed": "2"},
            id="no room",
        ),
        pytest.param(
            lambda client: client.forward(C, batch((3,))), NotFound, {"resource": C}, id="unknown"
        ),
        pytest.param(
            lambda client: client.forward_backward(
                A, 1, batch((MAX_LENGTH + 1,)), SAMPLED, epoch=1
            ),
            InvalidRequest,
            {"field": "data[0].token_ids"},
            id="too long",
        ),
        pytest.param(
            lambda client: client.forward_backward(A, 1, wild(batch((4, 4))), SAMPLED, epoch=1),
            NonFinite,
            {"field": "data[0]"},
            id="infinite loss",
        ),
        pytest.param(
            lambda client: client.forward_backward(A, 7, batch((4,)), SAMPLED, epoch=1),
            SequenceGap,
            {"expected_sequence": "1"},
            id="gap",
        ),
        pytest.param(
            lambda client: client.optim_step(A, 1, AdamConfig(float("nan")), epoch=1),
            InvalidRequest,
            {"field": "adam.learning_rate"},
            id="NaN learning rate",
        ),
        pytest.param(
            lambda client: client.optim_step(A, 1, ADAM, epoch=1),
            FailedPrecondition,
            {"resource": A},
            id="no gradients",
        ),
        pytest.param(
            lambda client: exported(client, A, 3), NotFound, {"value": "3"}, id="not published"
        ),
        *(
            pytest.param(
                lambda client, n=offset: published_from(client, A, n),
                InvalidRequest,
                {"field": "offset", "value": str(offset)},
                id=f"offset {offset}",
            )
            for offset in (-1, 2**40, 2**63 - 1)
        ),
    ],
)
async def test_an_error_reaches_its_caller_with_what_it_is_about(client, ask, error, context):
    for name in (A, B):
        await client.create_adapter(name, LORA, epoch=1)
    before = await client.get_adapter(A)
    with pytest.raises(error) as caught:
        await ask(client)
    assert type(caught.value) is error
    assert context.items() <= caught.value.context.items()
    assert await client.get_adapter(A) == before
    await client.forward_backward(A, 1, batch((4,)), SAMPLED, epoch=1)


def with_tensor(name, tensor):
    message = convert.datum_to_pb(batch((4,))[0])
    getattr(message, name).CopyFrom(tensor)
    return pb.ForwardBackwardRequest(
        adapter=A,
        sequence=1,
        epoch=1,
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
                adapter=A,
                sequence=1,
                epoch=1,
                loss_config=training_pb2.LossConfig(loss="LOSS_UNSPECIFIED"),
            ),
            "loss_config.loss",
            id="no loss",
        ),
    ],
)
async def test_a_message_that_says_nothing_sensible_is_the_callers_error(
    client, stub, request_, field
):
    await client.create_adapter(A, LORA, epoch=1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ForwardBackward(request_)
    error = to_error(caught.value)
    assert isinstance(error, InvalidRequest)
    assert error.context["field"] == field
    assert (await client.get_adapter(A)).next_sequence == 1


# --- snapshots and epochs ------------------------------------------------------------------------

NOWHERE = Snapshot("snapshots/" + "0" * 32, "0" * 64, 1, 0, 1, "0" * 64)


async def test_an_adapter_is_taken_over_from_its_snapshot_with_the_same_bits(client):
    await client.create_adapter(A, LORA, epoch=1)
    await train(client, A, 2)
    data = batch((4, 9), seed=7)
    await client.forward_backward(A, 5, data, SAMPLED, epoch=1)
    before = await client.get_adapter(A)
    snapshot = await client.snapshot_adapter(A, epoch=1)
    assert (snapshot.next_sequence, snapshot.policy_version) == (6, 2)
    expected = await client.optim_step(A, 6, ADAM, epoch=1)
    published = await client.publish_adapter(A, epoch=1)
    await client.delete_adapter(A, epoch=1)

    restored = await client.restore_adapter(A, snapshot, epoch=2)
    assert restored == replace(before, epoch=2)
    assert await client.restore_adapter(A, snapshot, epoch=2) == restored
    stepped = await client.optim_step(A, 6, ADAM, epoch=2)
    assert timeless(stepped) == timeless(expected)
    again = await client.publish_adapter(A, epoch=2)
    assert keyless(again) == keyless(published)
    assert again.export_key != published.export_key
    assert (await client.restore_adapter(A, snapshot, epoch=2)).next_sequence == 7


async def test_a_version_published_while_gradients_are_pending_is_published_again_from_a_snapshot(
    client,
):
    """Killed after that, its adapter goes on from a snapshot in which they are pending too."""
    await client.create_adapter(A, LORA, epoch=1)
    await train(client, A, 2)
    await client.forward_backward(A, 5, batch((4, 9), seed=7), SAMPLED, epoch=1)
    snapshot = await client.snapshot_adapter(A, epoch=1)
    published = await client.publish_adapter(A, epoch=1, with_pending_gradients=True)
    assert (published.policy_version, published.digest) == (2, snapshot.weights_digest)
    expected = await client.optim_step(A, 6, ADAM, epoch=1)
    after = await client.publish_adapter(A, epoch=1)
    await client.delete_adapter(A, epoch=1)

    await client.restore_adapter(A, snapshot, epoch=2)
    with pytest.raises(FailedPrecondition, match="pending gradients"):
        await client.publish_adapter(A, epoch=2)
    again = await client.publish_adapter(A, epoch=2, with_pending_gradients=True)
    assert keyless(again) == keyless(published)
    assert timeless(await client.optim_step(A, 6, ADAM, epoch=2)) == timeless(expected)
    assert keyless(await client.publish_adapter(A, epoch=2)) == keyless(after)


async def test_a_snapshot_becomes_another_adapter_or_the_state_of_one(client):
    await client.create_adapter(A, LORA, epoch=1)
    digest = (await train(client, A, 2)).digest
    snapshot = await client.snapshot_adapter(A, epoch=1)
    assert snapshot.weights_digest == digest
    fork = await client.create_adapter(B, None, epoch=1, fork_of=snapshot, with_optimizer=True)
    assert (fork.lora, fork.policy_version, fork.next_sequence) == (
        (await client.get_adapter(A)).lora,
        0,
        1,
    )
    assert (await client.publish_adapter(B, epoch=1)).digest == digest
    assert (await train(client, B, 1)).digest != digest
    load = {"with_optimizer": False, "epoch": 1}
    loaded = await client.load_snapshot(B, 3, snapshot, **load)
    assert loaded.policy_version == 2
    assert await client.load_snapshot(B, 3, snapshot, **load) == loaded
    assert (await client.publish_adapter(B, epoch=1)).digest == digest
    with pytest.raises(AlreadyExists):
        await client.load_snapshot(B, 3, snapshot, with_optimizer=True, epoch=1)
    with pytest.raises(SequenceGap):
        await client.load_snapshot(B, 5, snapshot, **load)


KEYS = {
    "absolute": "/etc/passwd",
    "climbing": "snapshots/../../" + "0" * 32,
    "another folder": "ops/" + "0" * 32,
    "a file of it": "snapshots/" + "0" * 32 + "/adapter",
    "empty": "",
}
NAMES = {"absolute": "/etc/passwd", "climbing": "projects/p/adapters/../b", "empty": ""}


def hostile():
    """Calls that must be refused, with the error and what it is about."""
    made = [
        *(
            (f"restore, {said} key", lambda c, k=key: c.restore_adapter(C, at(k), epoch=1))
            for said, key in KEYS.items()
        ),
        *(
            (
                f"fork, {said} key",
                lambda c, k=key: c.create_adapter(C, None, epoch=1, fork_of=at(k)),
            )
            for said, key in KEYS.items()
        ),
        *(
            (
                f"load, {said} key",
                lambda c, k=key: c.load_snapshot(A, 1, at(k), with_optimizer=True, epoch=1),
            )
            for said, key in KEYS.items()
        ),
    ]
    for said, ask in made:
        yield pytest.param(ask, InvalidRequest, {"field": "snapshot.key"}, id=said)
    for said, name in NAMES.items():
        for verb, ask in (
            ("create", lambda c, n=name: c.create_adapter(n, LORA, epoch=1)),
            ("restore", lambda c, n=name: c.restore_adapter(n, NOWHERE, epoch=1)),
        ):
            yield pytest.param(ask, InvalidRequest, {"field": "name"}, id=f"{verb}, {said} name")
        for verb, ask in (
            ("snapshot", lambda c, n=name: c.snapshot_adapter(n, epoch=1)),
            (
                "load",
                lambda c, n=name: c.load_snapshot(n, 1, NOWHERE, with_optimizer=True, epoch=1),
            ),
            ("publish", lambda c, n=name: c.publish_adapter(n, epoch=1)),
            ("step", lambda c, n=name: c.optim_step(n, 1, ADAM, epoch=1)),
        ):
            yield pytest.param(ask, NotFound, {"resource": name}, id=f"{verb}, {said} name")
    for epoch in (0, 1, 3):
        held = {"field": "epoch", "value": str(epoch), "allowed": "2"}
        for verb, ask in (
            ("batch", lambda c, e: c.forward_backward(B, 1, batch((4,)), SAMPLED, epoch=e)),
            ("step", lambda c, e: c.optim_step(B, 1, ADAM, epoch=e)),
            ("load", lambda c, e: c.load_snapshot(B, 1, NOWHERE, with_optimizer=True, epoch=e)),
            ("snapshot", lambda c, e: c.snapshot_adapter(B, epoch=e)),
            ("publish", lambda c, e: c.publish_adapter(B, epoch=e)),
        ):
            yield pytest.param(
                lambda c, ask=ask, e=epoch: ask(c, e), Fenced, held, id=f"{verb}, epoch {epoch}"
            )
    for verb, ask in (
        ("create", lambda c, e: c.create_adapter(B, LORA, epoch=e)),
        ("restore", lambda c, e: c.restore_adapter(B, NOWHERE, epoch=e)),
        ("delete", lambda c, e: c.delete_adapter(B, epoch=e)),
    ):
        for epoch, error in ((1, Fenced), (0, InvalidRequest)):
            yield pytest.param(
                lambda c, ask=ask, e=epoch: ask(c, e),
                error,
                {"field": "epoch", "value": str(epoch)},
                id=f"{verb}, epoch {epoch}",
            )
    for verb, ask in (
        ("restore", lambda c: c.restore_adapter(A, NOWHERE, epoch=2)),
        ("load", lambda c: c.load_snapshot(A, 1, NOWHERE, with_optimizer=True, epoch=1)),
    ):
        where = {"resource": f"{NOWHERE.key}/manifest"}
        yield pytest.param(ask, NotFound, where, id=f"{verb}, no such snapshot")
    yield pytest.param(
        lambda c: c.create_adapter(C, None, epoch=1),
        InvalidRequest,
        {"field": "lora"},
        id="no shape",
    )


def at(key):
    return replace(NOWHERE, key=key)


@pytest.mark.parametrize(("ask", "error", "context"), list(hostile()))
async def test_what_is_refused_says_why_and_changes_nobodys_bits(client, ask, error, context):
    await client.create_adapter(A, LORA, epoch=1)
    await client.create_adapter(B, LORA, epoch=2)
    before = [await client.publish_adapter(name, epoch=e) for name, e in ((A, 1), (B, 2))]
    held = await client.get_trainer()
    with pytest.raises(error) as caught:
        await ask(client)
    assert type(caught.value) is error
    assert context.items() <= caught.value.context.items()
    assert await client.get_trainer() == held
    after = [await client.publish_adapter(name, epoch=e) for name, e in ((A, 1), (B, 2))]
    assert after == before
    assert [(await client.get_adapter(name)).next_sequence for name in (A, B)] == [1, 1]


async def test_a_spoilt_or_foreign_snapshot_is_refused_with_what_differs(client, tmp_path):
    await client.create_adapter(A, LORA, epoch=1)
    digest = (await client.publish_adapter(A, epoch=1)).digest
    snapshot = await client.snapshot_adapter(A, epoch=1)
    with pytest.raises(FailedPrecondition) as caught:
        await client.restore_adapter(B, snapshot, epoch=1)
    assert caught.value.context["value"] == A
    async with tiny_adapters(blobs=str(tmp_path / "blobs"), base_model="large") as others:
        await others.create(B, LORA, epoch=1)
        foreign = await others.get(B).snapshot(1)
    with pytest.raises(FailedPrecondition) as caught:
        await client.restore_adapter(B, foreign, epoch=1)
    assert caught.value.context["value"] == "large"
    (tmp_path / "blobs" / snapshot.key / "adapter").write_bytes(b"\x80\x04N.")
    for ask in (
        lambda: client.restore_adapter(A, snapshot, epoch=2),
        lambda: client.create_adapter(B, None, epoch=1, fork_of=snapshot),
        lambda: client.load_snapshot(A, 1, snapshot, with_optimizer=False, epoch=1),
    ):
        with pytest.raises(DigestMismatch) as caught:
            await ask()
        assert caught.value.context["resource"] == f"{snapshot.key}/adapter"
    assert (await client.publish_adapter(A, epoch=1)).digest == digest


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
        blobs=str(tmp_path / "blobs"),
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
            await client.create_adapter(A, LORA, epoch=1)
            published = await client.publish_adapter(A, epoch=1)
            # Ops that are under way and waiting when the end comes.
            calls = [
                asyncio.ensure_future(
                    client.forward_backward(A, sequence, batch((9,) * 100), SAMPLED, epoch=1)
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
        stored = StoredExport(Blobs(str(tmp_path / "blobs")), published.export_key)
        assert stored.digest == published.digest
        file = stored.read(0, stored.export.num_bytes)
        assert safetensors_digest(file) == published.digest
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_trainer_told_to_end_serves_on_until_its_adapters_have_moved_away(tmp_path):
    tiny_qwen3().save_pretrained(tmp_path / "tiny")
    _, process = await start(
        tmp_path,
        base_model={"name": "tiny", "path": str(tmp_path / "tiny")},
        listen="127.0.0.1:0",
        num_threads=1,
        blobs=str(tmp_path / "blobs"),
        drain_s=60.0,
    )
    try:
        line = json.loads(await process.stderr.readline())
        async with channel(f"127.0.0.1:{line['port']}") as opened:
            client = TrainerClient(opened)
            await client.create_adapter(A, LORA, epoch=1)
            first = await client.get_trainer()
            assert len(first.instance_id) == 32
            process.terminate()
            while not (await client.get_trainer()).draining:
                pass
            await train(client, A, 1)
            snapshot = await client.snapshot_adapter(A, epoch=1)
            await client.delete_adapter(A, epoch=1)
        assert await process.wait() == 0
        assert (tmp_path / "blobs" / snapshot.key / "manifest").exists()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
