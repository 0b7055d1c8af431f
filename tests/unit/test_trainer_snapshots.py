"""Snapshots: restored is the same as never interrupted, forks, loads, and what is refused."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load

from rollmesh.blobs import Blobs
from rollmesh.digest import safetensors_digest
from rollmesh.errors import (
    DigestMismatch,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from rollmesh.snapshots import blob_keys, read_file, read_manifest
from rollmesh.types import AdamConfig, LoraConfig, LossConfig
from services.trainer.model import Model
from services.trainer.snapshots import NUM_THREADS
from tests.fakes.tiny_qwen3 import batch, tiny_adapters, tiny_model, tiny_qwen3

A, B, C = (f"projects/p/adapters/{letter}" for letter in "abc")
LORA = LoraConfig(4, seed=5)
SAMPLED = LossConfig("importance_sampling", 0.1)
ADAM = AdamConfig(1e-2, weight_decay=0.01, max_grad_norm=1.0)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "blobs"


@pytest.fixture
async def adapters(folder):
    async with tiny_adapters(blobs=str(folder)) as adapters:
        await adapters.create(A, LORA, epoch=1)
        yield adapters


@pytest.fixture
async def others(folder):
    """Another trainer's, on the same blobs."""
    async with tiny_adapters(blobs=str(folder)) as others:
        yield others


async def go_on(adapters, name, num_ops, *, epoch=1):
    """The next ops: two batches, a step, and so on; the results, without times."""
    results = []
    for _ in range(num_ops):
        sequence = adapters.view(name).next_sequence
        held = adapters.get(name)
        if sequence % 3:
            data = batch((4, 9, 6), seed=sequence)
            found = await held.forward_backward(epoch, sequence, data, SAMPLED)
            metrics = {key: found.metrics[key] for key in found.metrics if key[-2:] != "_s"}
            results.append([metrics, [row.tolist() for row in found.logprobs]])
        else:
            stepped = await held.optim_step(epoch, sequence, ADAM)
            results.append([stepped.policy_version, stepped.metrics["grad_norm"]])
    return results


def tensors(adapters, name):
    """All that an adapter's future depends on."""
    state = adapters.get(name)._state
    parts = (
        state.weights.parameters(),
        state.adam.first_moments,
        state.adam.second_moments,
        state.pending or (),
    )
    return [tensor for part in parts for tensor in part]


def equal(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


# --- bit for bit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_ops", [0, 1, 2, 3, 8])
async def test_restored_is_the_same_as_never_interrupted(folder, dtype, num_ops):
    def model():
        torch.set_num_threads(1)
        return Model(tiny_qwen3().to(getattr(torch, dtype)), max_batch_tokens=256)

    async with (
        tiny_adapters(model(), str(folder)) as first,
        tiny_adapters(model(), str(folder)) as second,
    ):
        before = await first.create(A, LORA, epoch=1)
        await go_on(first, A, num_ops)
        snapshot = await first.get(A).snapshot(1)
        restored = await second.restore(A, snapshot, epoch=2)
        assert restored == replace(first.view(A), epoch=2)
        assert (restored.has_pending_gradients, before.lora) == (num_ops % 3 > 0, restored.lora)
        assert equal(tensors(second, A), tensors(first, A))
        assert await go_on(second, A, 7, epoch=2) == await go_on(first, A, 7)
        assert equal(tensors(second, A), tensors(first, A))
        states = [held.get(A)._state for held in (first, second)]
        assert states[0].adam.step == states[1].adam.step > 0


async def test_a_snapshot_is_of_the_moment_between_two_ops_in_which_it_was_taken(adapters, others):
    snapshot = await adapters.get(A).snapshot(1)
    await go_on(adapters, A, 6)
    again = await adapters.get(A).snapshot(1)
    assert (snapshot.next_sequence, again.next_sequence) == (1, 7)
    assert (snapshot.policy_version, again.policy_version) == (0, 2)
    assert snapshot.key != again.key
    await others.restore(A, snapshot, epoch=2)
    await go_on(others, A, 6, epoch=2)
    assert equal(tensors(others, A), tensors(adapters, A))


async def test_a_snapshot_says_what_it_is_to_readers_without_torch(adapters, folder):
    await go_on(adapters, A, 4)
    snapshot = await adapters.get(A).snapshot(1)
    blobs = Blobs(str(folder))
    manifest = read_manifest(blobs, snapshot)
    assert (manifest.adapter, manifest.base_model) == (A, "tiny")
    assert manifest.lora.lora() == adapters.view(A).lora
    assert (manifest.policy_version, manifest.next_sequence, manifest.adam_step) == (1, 5, 1)
    file = read_file(blobs, snapshot, manifest, "adapter")
    assert manifest.weights_digest == snapshot.weights_digest == safetensors_digest(file)
    assert snapshot.num_bytes == sum(len(blobs.read(key)) for key in blob_keys(snapshot.key))
    assert {key for key, _ in blobs.keys("snapshots")} == set(blob_keys(snapshot.key))
    # As a published version of the same weights has them.
    await go_on(adapters, A, 2)
    state = adapters.get(A)._state
    await adapters.get(A).publish(1)
    version = adapters.version(A, state.policy_version)
    snapshot = await adapters.get(A).snapshot(1)
    manifest = read_manifest(blobs, snapshot)
    assert read_file(blobs, snapshot, manifest, "adapter") == version.file
    assert manifest.adapter_config_json == version.header.adapter_config_json
    assert snapshot.weights_digest == version.digest


# --- beside the ops that go on -------------------------------------------------------------------


class HeldUp(Blobs):
    """A blob store that takes its time, until `open` is set; then, with `full`, it says no."""

    def __init__(self, url):
        super().__init__(url)
        self.reached = threading.Semaphore(0)
        self.open = threading.Event()
        self.full = False

    def write(self, key, *parts):
        self.reached.release()
        self.open.wait()
        if self.full:
            raise Unavailable("the blob store does not answer")
        super().write(key, *parts)


@pytest.fixture
def slow(adapters, folder):
    blobs = HeldUp(str(folder))
    adapters._snapshots._blobs = blobs
    yield blobs
    blobs.open.set()


async def test_ops_go_on_while_a_snapshot_is_written(adapters, others, slow):
    await go_on(adapters, A, 2)
    expected = tensors(adapters, A)
    writing = asyncio.ensure_future(adapters.get(A).snapshot(1))
    await asyncio.to_thread(slow.reached.acquire)
    await go_on(adapters, A, 4)
    assert not writing.done()
    slow.open.set()
    snapshot = await writing
    assert (snapshot.next_sequence, adapters.view(A).next_sequence) == (3, 7)
    await others.restore(A, snapshot, epoch=2)
    assert equal(tensors(others, A), expected)


async def test_snapshots_that_wait_hold_nothing_and_are_bounded(adapters, slow):
    writing = [asyncio.ensure_future(adapters.get(A).snapshot(1)) for _ in range(NUM_THREADS)]
    for _ in range(NUM_THREADS):
        await asyncio.to_thread(slow.reached.acquire)
    waiting = [asyncio.ensure_future(adapters.get(A).snapshot(1)) for _ in range(8)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as caught:
        await adapters.get(A).snapshot(1)
    assert caught.value.context["allowed"] == "8"
    await go_on(adapters, A, 3)
    waiting[0].cancel()
    slow.open.set()
    assert {(await snapshot).next_sequence for snapshot in writing} == {1}
    assert {(await snapshot).next_sequence for snapshot in waiting[1:]} == {4}


async def test_a_snapshot_of_an_adapter_that_is_deleted_meanwhile(adapters, others, slow):
    writing = [asyncio.ensure_future(adapters.get(A).snapshot(1)) for _ in range(NUM_THREADS)]
    for _ in range(NUM_THREADS):
        await asyncio.to_thread(slow.reached.acquire)
    waiting = asyncio.ensure_future(adapters.get(A).snapshot(1))
    await asyncio.sleep(0)
    adapters.delete(A, epoch=1)
    slow.open.set()
    await others.restore(A, await writing[0], epoch=2)
    await writing[1]
    with pytest.raises(NotFound):
        await waiting


async def test_a_snapshot_that_cannot_be_written_changes_nothing(adapters, slow):
    await go_on(adapters, A, 1)
    before, held = adapters.view(A), tensors(adapters, A)
    slow.full = True
    slow.open.set()
    with pytest.raises(Unavailable):
        await adapters.get(A).snapshot(1)
    assert adapters.view(A) == before
    assert equal(tensors(adapters, A), held)
    slow.full = False
    assert (await adapters.get(A).snapshot(1)).next_sequence == 2


# --- restoring -----------------------------------------------------------------------------------


async def test_a_repeat_answers_what_is_held_and_a_higher_epoch_restores_anew(adapters):
    await go_on(adapters, A, 3)
    snapshot = await adapters.get(A).snapshot(1)
    await go_on(adapters, A, 2)
    assert (await adapters.restore(A, snapshot, epoch=1)).next_sequence == 6
    assert (await adapters.restore(A, snapshot, epoch=2)).next_sequence == 4
    await go_on(adapters, A, 1, epoch=2)
    assert (await adapters.restore(A, snapshot, epoch=2)).next_sequence == 5


async def test_a_restore_that_fails_leaves_what_is_held(adapters, folder):
    await go_on(adapters, A, 3)
    snapshot = await adapters.get(A).snapshot(1)
    (folder / snapshot.key / "state").write_bytes(b"")
    with pytest.raises(DigestMismatch):
        await adapters.restore(A, snapshot, epoch=2)
    await go_on(adapters, A, 1)


def spoil(name, content):
    def change(folder, snapshot):
        path = folder / snapshot.key / name
        path.write_bytes(content(path.read_bytes()))

    return change


@pytest.mark.parametrize(
    ("change", "error"),
    [
        *(
            pytest.param(spoil(name, content), DigestMismatch, id=f"{name}: {said}")
            for name in ("adapter", "state", "manifest")
            for said, content in (
                ("truncated", lambda old: old[:-1]),
                ("empty", lambda old: b""),
                ("one bit", lambda old: old[:-9] + bytes([old[-9] ^ 1]) + old[-8:]),
                ("a pickle", lambda old: b"\x80\x04N."),
            )
        ),
        *(
            pytest.param(
                lambda folder, snapshot, name=name: (folder / snapshot.key / name).unlink(),
                NotFound,
                id=f"no {name}",
            )
            for name in ("adapter", "state", "manifest")
        ),
    ],
)
async def test_what_is_not_what_was_written_is_refused(adapters, others, folder, change, error):
    await go_on(adapters, A, 2)
    snapshot = await adapters.get(A).snapshot(1)
    change(folder, snapshot)
    with pytest.raises(error) as caught:
        await others.restore(A, snapshot, epoch=2)
    assert caught.value.context["resource"].startswith(snapshot.key)
    assert others.info().held == ()


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "../snapshots/" + "0" * 32,
        "snapshots/../" + "0" * 32,
        "snapshots/" + "0" * 31,
        "snapshots/" + "A" * 32,
        "snapshots/" + "0" * 32 + "/adapter",
        "ops/" + "0" * 32,
        "snapshots/" + "0" * 32 + "\n",
    ],
)
async def test_a_key_of_another_form_is_refused(adapters, key):
    snapshot = replace(await adapters.get(A).snapshot(1), key=key)
    for ask in (
        lambda: adapters.restore(B, snapshot, epoch=1),
        lambda: adapters.create(B, None, epoch=1, fork_of=snapshot),
        lambda: adapters.get(A).load_snapshot(1, 1, snapshot, with_optimizer=True),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await ask()
        assert caught.value.context["field"] == "snapshot.key"


async def test_another_digest_than_asked_for_is_refused(adapters, others):
    snapshot = await adapters.get(A).snapshot(1)
    with pytest.raises(DigestMismatch) as caught:
        await others.restore(A, replace(snapshot, digest="0" * 64), epoch=1)
    assert caught.value.context["allowed"] == "0" * 64


async def test_an_adapter_is_restored_from_its_own_snapshots_alone(adapters):
    snapshot = await adapters.get(A).snapshot(1)
    with pytest.raises(FailedPrecondition) as caught:
        await adapters.restore(B, snapshot, epoch=1)
    assert caught.value.context["value"] == A


async def test_a_snapshot_of_another_base_model_is_refused(adapters, folder):
    snapshot = await adapters.get(A).snapshot(1)
    async with tiny_adapters(blobs=str(folder), base_model="large") as others:
        await others.create(B, LORA, epoch=1)
        for ask in (
            lambda: others.restore(A, snapshot, epoch=1),
            lambda: others.create(A, None, epoch=1, fork_of=snapshot),
            lambda: others.get(B).load_snapshot(1, 1, snapshot, with_optimizer=False),
        ):
            with pytest.raises(FailedPrecondition) as caught:
                await ask()
            assert caught.value.context["field"] == "base_model"
            assert caught.value.context["value"] == "tiny"
            assert caught.value.context["allowed"] == "large"


async def test_a_model_of_the_same_name_and_another_size_is_refused(adapters, folder):
    snapshot = await adapters.get(A).snapshot(1)
    torch.set_num_threads(1)
    for module in (tiny_qwen3(num_key_value_heads=2), tiny_qwen3()):
        other = Model(module, max_batch_tokens=256)
        if module.config.num_key_value_heads == 1:
            # One layer less: all that is here fits, and is not all of the snapshot.
            other.lora._layers.pop(next(iter(other.lora._layers)))
        async with tiny_adapters(other, str(folder)) as others:
            with pytest.raises(FailedPrecondition):
                await others.restore(A, snapshot, epoch=1)


# --- forks and loads -----------------------------------------------------------------------------


@pytest.mark.parametrize("with_optimizer", [False, True])
async def test_a_fork_begins_with_the_weights_and_on_demand_the_optimizer(adapters, with_optimizer):
    await go_on(adapters, A, 7)
    snapshot = await adapters.get(A).snapshot(1)
    view = await adapters.create(B, None, epoch=1, fork_of=snapshot, with_optimizer=with_optimizer)
    assert view.lora == adapters.view(A).lora
    assert (view.policy_version, view.next_sequence, view.has_pending_gradients) == (0, 1, False)
    source, fork = adapters.get(A)._state, adapters.get(B)._state
    assert equal(fork.weights.parameters(), source.weights.parameters())
    assert fork.adam.step == (source.adam.step if with_optimizer else 0)
    assert equal(fork.adam.second_moments, source.adam.second_moments) is with_optimizer
    before = tensors(adapters, A)
    await go_on(adapters, B, 3)
    assert equal(tensors(adapters, A), before)
    assert adapters.get(B).view.policy_version == 1


async def test_a_fork_is_of_the_snapshots_shape(adapters):
    snapshot = await adapters.get(A).snapshot(1)
    await adapters.create(B, replace(LORA, seed=9), epoch=1, fork_of=snapshot)
    with pytest.raises(FailedPrecondition) as caught:
        await adapters.create(C, LoraConfig(2), epoch=1, fork_of=snapshot)
    assert caught.value.context["field"] == "lora.rank"


@pytest.mark.parametrize("with_optimizer", [False, True])
async def test_a_load_puts_another_state_in_place_as_one_more_version(adapters, with_optimizer):
    await go_on(adapters, A, 7)
    snapshot = await adapters.get(A).snapshot(1)
    await adapters.create(B, replace(LORA, seed=9), epoch=1)
    await go_on(adapters, B, 3)
    load = adapters.get(B).load_snapshot
    results = [await load(1, 4, snapshot, with_optimizer=with_optimizer) for _ in range(2)]
    assert [result.policy_version for result in results] == [2, 2]
    view = adapters.view(B)
    assert (view.policy_version, view.next_sequence, view.has_pending_gradients) == (2, 5, False)
    assert view.lora.seed == 9
    source, found = adapters.get(A)._state, adapters.get(B)._state
    assert equal(found.weights.parameters(), source.weights.parameters())
    assert found.adam.step == (2 if with_optimizer else 0)
    assert equal(found.adam.first_moments, source.adam.first_moments) is with_optimizer
    assert (await adapters.get(B).publish(1)).digest == snapshot.weights_digest


@pytest.mark.parametrize(
    ("lora", "field"),
    [
        (LoraConfig(2), "lora.rank"),
        (LoraConfig(4, alpha=4.0), "lora.alpha"),
        (LoraConfig(4, target_modules=("q_proj",)), "lora.target_modules"),
    ],
)
async def test_a_load_of_another_shape_is_refused(adapters, lora, field):
    snapshot = await adapters.get(A).snapshot(1)
    await adapters.create(B, lora, epoch=1)
    with pytest.raises(FailedPrecondition) as caught:
        await adapters.get(B).load_snapshot(1, 1, snapshot, with_optimizer=True)
    assert caught.value.context["field"] == field
    assert adapters.view(B).next_sequence == 1


def test_the_state_holds_moments_and_gradients_by_the_names_of_their_parameters(folder):
    async def write():
        async with tiny_adapters(tiny_model(), str(folder)) as adapters:
            await adapters.create(A, LoraConfig(1, target_modules=("v_proj",)), epoch=1)
            await go_on(adapters, A, 1)
            return await adapters.get(A).snapshot(1)

    snapshot = asyncio.run(write())
    state = load((folder / snapshot.key / "state").read_bytes())
    names = load((folder / snapshot.key / "adapter").read_bytes())
    assert state.keys() == {
        f"{part}.{name}" for part in ("first_moment", "second_moment", "gradient") for name in names
    }
