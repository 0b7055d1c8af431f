"""The adapters' state machine: sequences, epochs, versions, capacity, determinism, isolation."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from rollmesh.errors import (
    AlreadyExists,
    CapacityExhausted,
    FailedPrecondition,
    Fenced,
    InvalidRequest,
    NonFinite,
    NotFound,
    Overloaded,
    SequenceGap,
)
from rollmesh.types import AdamConfig, HeldAdapter, LoraConfig, LossConfig, Snapshot
from services.trainer.adapters import SILENCE_S
from services.trainer.model import Model
from tests.fakes.tiny_qwen3 import TARGETS, batch, tiny_adapters, tiny_qwen3

A, B = "projects/p/adapters/a", "projects/p/adapters/b"
LORA = LoraConfig(4, seed=5)
SAMPLED = LossConfig("importance_sampling", 0.1)
ADAM = AdamConfig(1e-2, weight_decay=0.01, max_grad_norm=1.0)
NOWHERE = Snapshot("snapshots/" + "0" * 32, "0" * 64, 1, 0, 1, "0" * 64)


class Gate:
    """Stands before each pass over a model; open unless closed."""

    def __init__(self):
        self.reached = threading.Event()
        self.open = threading.Event()
        self.open.set()

    def wait(self, *_):
        self.reached.set()
        self.open.wait()


@pytest.fixture
async def gate():
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
async def adapters(gate):
    module = tiny_qwen3()
    module.register_forward_pre_hook(gate.wait)
    torch.set_num_threads(1)
    async with tiny_adapters(Model(module, max_batch_tokens=256)) as adapters:
        await adapters.create(A, LORA, epoch=1)
        yield adapters
        gate.open.set()


@contextlib.asynccontextmanager
async def with_a(**changes):
    """Other adapters, of which A is one."""
    async with tiny_adapters(**changes) as adapters:
        await adapters.create(A, LORA, epoch=1)
        yield adapters


async def forward_backward(adapters, sequence, data, config=SAMPLED, *, name=A, epoch=1):
    return await adapters.get(name).forward_backward(epoch, sequence, data, config)


async def optim_step(adapters, sequence, config=ADAM, *, name=A, epoch=1):
    return await adapters.get(name).optim_step(epoch, sequence, config)


async def publish(adapters, name=A, *, epoch=1):
    return await adapters.get(name).publish(epoch)


async def weights(adapters) -> tuple[int, str]:
    """The current version, and what its tensors are."""
    published = await publish(adapters)
    return published.policy_version, published.digest


async def train(adapters, name, steps, *, seed=0):
    """`steps` steps of two batches each; the digest of what they lead to."""
    epoch = adapters.view(name).epoch
    for step in range(steps):
        sequence = adapters.view(name).next_sequence
        for part in range(2):
            data = batch((4, 9, 6), seed=seed + 2 * step + part)
            await forward_backward(adapters, sequence + part, data, name=name, epoch=epoch)
        await optim_step(adapters, sequence + 2, name=name, epoch=epoch)
    return (await publish(adapters, name, epoch=epoch)).digest


def spoilt():
    """A batch whose second datum has an infinite loss."""
    data = batch((4, 6))
    data[1] = replace(data[1], sampling_logprobs=np.full(6, -1e4, np.float32))
    return data


def huge():
    """A batch whose gradients are finite, but not twice them."""
    data = batch((5,))
    return [replace(datum, weights=datum.weights * np.float32(1e37)) for datum in data]


def without_times(metrics):
    return {name: value for name, value in metrics.items() if name not in {"queued_s", "run_s"}}


# --- creation ------------------------------------------------------------------------------------


async def test_a_fresh_adapter_tells_its_shape_with_defaults_filled_in(adapters):
    view = adapters.view(A)
    assert view.lora.alpha == 8.0
    assert set(view.lora.target_modules) == set(TARGETS)
    assert (view.policy_version, view.next_sequence, view.has_pending_gradients) == (0, 1, False)
    assert view.epoch == 1


async def test_creating_the_same_again_answers_the_one_that_exists(adapters):
    await train(adapters, A, 1)
    same = LoraConfig(4, alpha=8.0, target_modules=TARGETS[::-1], seed=5)
    again = await adapters.create(A, same, epoch=1)
    assert again == adapters.view(A)
    assert again.policy_version == 1


@pytest.mark.parametrize(
    "other", [LoraConfig(2, seed=5), LoraConfig(4), LoraConfig(4, alpha=4.0, seed=5)]
)
async def test_creating_something_else_under_a_name_that_is_taken_is_refused(adapters, other):
    with pytest.raises(AlreadyExists):
        await adapters.create(A, other, epoch=1)


async def test_two_that_create_the_same_at_once_get_the_same(adapters):
    views = await asyncio.gather(*(adapters.create(B, LORA, epoch=1) for _ in range(3)))
    assert views == [adapters.view(B)] * 3


@pytest.mark.parametrize("name", ["", "a", "projects/p/adapters/..", "projects/p/adapters/A"])
async def test_a_malformed_name_is_refused(adapters, name):
    with pytest.raises(InvalidRequest):
        await adapters.create(name, LORA, epoch=1)


@pytest.mark.parametrize("epoch", [0, -1])
async def test_epochs_begin_at_one(adapters, epoch):
    for ask in (
        lambda: adapters.create(B, LORA, epoch=epoch),
        lambda: adapters.restore(B, NOWHERE, epoch=epoch),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await ask()
        assert caught.value.context["field"] == "epoch"
    with pytest.raises(InvalidRequest):
        adapters.delete(A, epoch=epoch)


async def test_an_adapter_needs_a_shape(adapters):
    with pytest.raises(InvalidRequest) as caught:
        await adapters.create(B, None, epoch=1)
    assert caught.value.context["field"] == "lora"


async def test_one_adapter_too_many_is_refused_until_one_is_deleted(adapters):
    for name in (B, f"{B}2"):
        await adapters.create(name, LORA, epoch=1)
    with pytest.raises(CapacityExhausted) as caught:
        await adapters.create(f"{B}3", LORA, epoch=1)
    assert caught.value.context["allowed"] == "3"
    await adapters.create(A, LORA, epoch=1)  # one that exists takes no room
    await adapters.create(A, LORA, epoch=2)  # nor does one that replaces it
    adapters.delete(B, epoch=1)
    adapters.delete(B, epoch=1)
    await adapters.create(f"{B}3", LORA, epoch=1)
    assert adapters.info().num_adapters == 3


async def test_memory_is_counted_before_it_is_taken():
    async with with_a() as adapters:
        per_adapter = adapters.info().adapter_bytes
        state = adapters.get(A)._state
        num_parameters = sum(tensor.numel() for tensor in state.weights.parameters())
        # Weights, two moments, gradients and two versions, float32.
        assert per_adapter == 4 * num_parameters * (4 + 2)
    async with with_a(max_adapter_bytes=2 * per_adapter - 1) as adapters:
        with pytest.raises(CapacityExhausted) as caught:
            await adapters.create(B, LORA, epoch=1)
        assert caught.value.context["value"] == str(2 * per_adapter)
        assert caught.value.context["allowed"] == str(2 * per_adapter - 1)
        await adapters.create(B, LoraConfig(2), epoch=1)
        assert adapters.info().adapter_bytes == 1.5 * per_adapter
        await adapters.create(A, LORA, epoch=2)
        for name in (A, B):
            adapters.delete(name, epoch=2)
        assert adapters.info().adapter_bytes == 0


async def test_a_deleted_adapter_frees_its_memory(adapters):
    await train(adapters, A, 2)
    await forward_backward(adapters, 7, batch((4,)))
    adapter = adapters.get(A)
    state = adapter._state
    held = [
        *state.weights.parameters(),
        *state.adam.first_moments,
        *state.adam.second_moments,
        *state.pending,
    ]
    gone = [weakref.ref(value) for value in (*held, adapter)]
    del adapter, state, held
    adapters.delete(A, epoch=1)
    gc.collect()
    assert [ref() for ref in gone if ref() is not None] == []


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda adapters: adapters.get(B), id="get"),
        pytest.param(lambda adapters: adapters.view(B), id="view"),
        pytest.param(lambda adapters: adapters.version(B, 0), id="version"),
    ],
)
async def test_an_adapter_that_is_not_held_is_not_found(adapters, ask):
    with pytest.raises(NotFound) as caught:
        ask(adapters)
    assert caught.value.context["resource"] == B


# --- epochs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 1, 3])
async def test_a_call_under_another_epoch_is_fenced_and_changes_nothing(adapters, epoch):
    await adapters.create(A, LORA, epoch=2)
    await forward_backward(adapters, 1, batch((4,)), epoch=2)
    before = adapters.view(A)
    held = adapters.get(A)
    for ask in (
        lambda: held.forward_backward(epoch, 2, batch((4,)), SAMPLED),
        lambda: held.forward_backward(epoch, 1, batch((4,)), SAMPLED),  # also what is answered
        lambda: held.optim_step(epoch, 2, ADAM),
        lambda: held.load_snapshot(epoch, 2, NOWHERE, with_optimizer=True),
        lambda: held.snapshot(epoch),
        lambda: held.publish(epoch),
    ):
        with pytest.raises(Fenced) as caught:
            await ask()
        assert caught.value.context["allowed"] == "2"
    assert adapters.view(A) == before


async def test_a_lower_epoch_neither_creates_nor_deletes(adapters):
    await adapters.create(A, LORA, epoch=3)
    for ask in (
        lambda: adapters.create(A, LORA, epoch=2),
        lambda: adapters.restore(A, NOWHERE, epoch=2),
    ):
        with pytest.raises(Fenced):
            await ask()
    with pytest.raises(Fenced):
        adapters.delete(A, epoch=2)
    assert adapters.info().held == (HeldAdapter(A, 3),)
    adapters.delete(A, epoch=4)
    assert adapters.info().held == ()


async def test_a_higher_epoch_replaces_what_is_held(adapters):
    trained = await train(adapters, A, 1)
    view = await adapters.create(A, LORA, epoch=2)
    assert (view.policy_version, view.next_sequence, view.epoch) == (0, 1, 2)
    with pytest.raises(NotFound):
        adapters.version(A, 1)
    assert await train(adapters, A, 1) == trained


@pytest.mark.parametrize(
    ("take_away", "reason"),
    [
        (lambda adapters: adapters.delete(A, epoch=1), NotFound),
        (lambda adapters: adapters.create(A, LORA, epoch=2), Fenced),
    ],
    ids=["deleted", "replaced"],
)
async def test_an_op_that_runs_while_its_adapter_is_taken_away_is_discarded(
    adapters, gate, take_away, reason
):
    await adapters.create(B, LORA, epoch=1)
    gate.open.clear()
    running, waiting, other = (
        asyncio.ensure_future(forward_backward(adapters, sequence, batch((4,)), name=name))
        for sequence, name in ((1, A), (2, A), (1, B))
    )
    await asyncio.to_thread(gate.reached.wait)
    taking = take_away(adapters)  # creation needs the thread that stands at the gate
    creation = asyncio.ensure_future(taking) if taking is not None else None
    gate.open.set()
    if creation is not None:
        await creation
        assert adapters.view(A).next_sequence == 1
    results = await asyncio.gather(running, waiting, return_exceptions=True)
    assert type(results[1]) is reason
    if creation is None:
        assert type(results[0]) is reason
    assert (await other).metrics["num_tokens"] == 3


# --- sequences -----------------------------------------------------------------------------------


async def test_a_repeat_of_the_newest_op_answers_its_result_and_changes_nothing(adapters):
    async with with_a() as once:
        for held, repeats in ((once, 1), (adapters, 3)):
            results = [await forward_backward(held, 1, batch((4, 9))) for _ in range(repeats)]
            assert all(result is results[0] for result in results)
            steps = [await optim_step(held, 2) for _ in range(repeats)]
            assert [step.policy_version for step in steps] == [1] * repeats
        assert await weights(adapters) == await weights(once)
    assert adapters.view(A).next_sequence == 3


async def test_repeats_that_come_while_the_op_runs_get_its_result(adapters, gate):
    gate.open.clear()
    calls = [asyncio.ensure_future(forward_backward(adapters, 1, batch((4, 9)))) for _ in range(3)]
    await asyncio.to_thread(gate.reached.wait)
    gate.open.set()
    first, *others = await asyncio.gather(*calls)
    assert all(other is first for other in others)
    assert adapters.view(A).next_sequence == 2


async def test_an_op_whose_caller_goes_away_goes_on_and_one_that_waits_never_runs(adapters, gate):
    gate.open.clear()
    running = asyncio.ensure_future(forward_backward(adapters, 1, batch((4, 9))))
    await asyncio.to_thread(gate.reached.wait)
    waiting = asyncio.ensure_future(optim_step(adapters, 2))
    await asyncio.sleep(0)
    for call in (running, waiting):
        call.cancel()
    await asyncio.wait([running, waiting])
    gate.open.set()
    await adapters.get(A).forward(batch((4,)))  # when its turn comes the op before it is done
    assert adapters.view(A).next_sequence == 2
    found = await forward_backward(adapters, 1, batch((4, 9)))
    assert adapters.view(A).next_sequence == 2
    async with with_a() as clean:
        expected = await forward_backward(clean, 1, batch((4, 9)))
    assert without_times(found.metrics) == without_times(expected.metrics)


async def test_a_used_sequence_with_another_body_is_refused(adapters):
    await forward_backward(adapters, 1, batch((4, 9)))
    others = [
        lambda: forward_backward(adapters, 1, batch((4, 9), seed=1)),
        lambda: forward_backward(adapters, 1, batch((4, 9)), LossConfig("importance_sampling")),
        lambda: forward_backward(adapters, 1, batch((9, 4))),
        lambda: optim_step(adapters, 1),
        lambda: adapters.get(A).load_snapshot(1, 1, NOWHERE, with_optimizer=False),
    ]
    for other in others:
        with pytest.raises(AlreadyExists) as caught:
            await other()
        assert caught.value.context["expected_sequence"] == "2"


@pytest.mark.parametrize("sequence", [1, 2, 5, 2**62])
async def test_a_gap_names_the_expected_sequence(adapters, sequence):
    await train(adapters, A, 1)
    with pytest.raises(SequenceGap) as caught:
        await optim_step(adapters, sequence)
    assert caught.value.context["expected_sequence"] == "4"


@pytest.mark.parametrize("sequence", [0, -1])
async def test_sequences_begin_at_one(adapters, sequence):
    with pytest.raises(InvalidRequest) as caught:
        await optim_step(adapters, sequence)
    assert caught.value.context["field"] == "sequence"


@pytest.mark.parametrize(
    ("op", "error"),
    [
        pytest.param(
            lambda adapters: forward_backward(adapters, 2, []), InvalidRequest, id="bad batch"
        ),
        pytest.param(
            lambda adapters: forward_backward(adapters, 2, spoilt()),
            NonFinite,
            id="loss not finite",
        ),
        pytest.param(
            lambda adapters: optim_step(adapters, 2, AdamConfig(float("nan"))),
            InvalidRequest,
            id="bad settings",
        ),
        pytest.param(
            lambda adapters: optim_step(adapters, 2, replace(ADAM, epsilon=1e-60)),
            NonFinite,
            id="step not finite",
        ),
        pytest.param(
            lambda adapters: adapters.get(A).load_snapshot(1, 2, NOWHERE, with_optimizer=True),
            FailedPrecondition,
            id="load over gradients",
        ),
    ],
)
async def test_a_refused_op_changes_nothing_and_does_not_use_up_its_sequence(adapters, op, error):
    async with with_a() as clean:
        for held in (clean, adapters):
            await forward_backward(held, 1, batch((4, 9)))
        before = adapters.view(A)
        with pytest.raises(error):
            await op(adapters)
        assert adapters.view(A) == before
        for held in (clean, adapters):
            await optim_step(held, 2)
        assert await weights(adapters) == await weights(clean)


async def test_a_step_without_gradients_is_refused(adapters):
    with pytest.raises(FailedPrecondition, match="no pending gradients"):
        await optim_step(adapters, 1)
    await train(adapters, A, 1)
    with pytest.raises(FailedPrecondition):
        await optim_step(adapters, 4)


async def test_more_ops_than_may_wait_are_refused_and_others_are_not(adapters, gate):
    await adapters.create(B, LORA, epoch=1)
    gate.open.clear()
    calls = [
        asyncio.ensure_future(forward_backward(adapters, sequence, batch((4,))))
        for sequence in range(1, 10)
    ]
    await asyncio.to_thread(gate.reached.wait)
    with pytest.raises(Overloaded) as caught:
        await forward_backward(adapters, 10, batch((4,)))
    assert caught.value.context["allowed"] == "8"
    other = asyncio.ensure_future(forward_backward(adapters, 1, batch((4,)), name=B))
    gate.open.set()
    await asyncio.gather(*calls, other)
    assert adapters.view(A).next_sequence == 10


# --- gradients -----------------------------------------------------------------------------------


async def test_two_halves_give_the_gradients_of_the_whole():
    data = batch((4, 9, 6, 3))
    norms = []
    for parts in ([data], [data[:2], data[2:]]):
        async with with_a() as adapters:
            for sequence, part in enumerate(parts, start=1):
                await forward_backward(adapters, sequence, part)
            step = await optim_step(adapters, len(parts) + 1, AdamConfig(1e-3))
            norms.append(step.metrics["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


async def test_pending_gradients_that_overflow_fail_the_batch_that_makes_them(adapters):
    data = huge()

    async def until_it_fails():
        for sequence in range(1, 100):
            await forward_backward(adapters, sequence, data)

    async with with_a() as clean:
        with pytest.raises(NonFinite) as caught:
            await until_it_fails()
        assert caught.value.context["field"] == "data"
        sequence = adapters.view(A).next_sequence
        assert sequence > 1
        for number in range(1, sequence):
            await forward_backward(clean, number, data)
        for held in (clean, adapters):
            await optim_step(held, sequence)
        assert await weights(adapters) == await weights(clean)


async def test_training_lowers_the_loss(adapters):
    data = batch((8, 8, 8), sampled=False)
    found = []
    for step in range(20):
        loss = LossConfig("cross_entropy")
        result = await forward_backward(adapters, 2 * step + 1, data, loss)
        found.append(result.metrics["loss"])
        await optim_step(adapters, 2 * step + 2, AdamConfig(1e-2))
    assert found[-1] < 0.5 * found[0]


async def test_forward_changes_nothing_and_tells_what_the_next_batch_sees(adapters):
    await train(adapters, A, 1)
    before = adapters.view(A)
    data = batch((4, 9))
    seen = (await adapters.get(A).forward(data)).logprobs
    assert adapters.view(A) == before
    trained = (await forward_backward(adapters, 4, data)).logprobs
    assert [row.tolist() for row in seen] == [row.tolist() for row in trained]


# --- determinism and isolation -------------------------------------------------------------------


async def test_the_same_ops_give_the_same_bits():
    digests = []
    for _ in range(2):
        async with with_a() as adapters:
            digests.append([await train(adapters, A, 1, seed=step) for step in range(4)])
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 4


async def test_the_ops_of_others_change_nothing(adapters):
    async with with_a() as alone:
        expected = [await train(alone, A, 1, seed=step) for step in range(3)]

    async def disturb(step):
        lora = LoraConfig(2, target_modules=("q_proj",), seed=step)
        await adapters.create(B, lora, epoch=1)
        await train(adapters, B, 2, seed=100 + step)
        with pytest.raises(NonFinite):
            await forward_backward(adapters, 7, spoilt(), name=B)
        await forward_backward(adapters, 7, huge(), name=B)
        adapters.delete(B, epoch=1)

    found = []
    for step in range(3):
        digest, _ = await asyncio.gather(train(adapters, A, 1, seed=step), disturb(step))
        found.append(digest)
    assert found == expected


# --- versions ------------------------------------------------------------------------------------


async def test_publishing_a_version_again_answers_the_same(adapters):
    first = await publish(adapters)
    assert await publish(adapters) == first
    await forward_backward(adapters, 1, batch((4,)))
    assert await publish(adapters) == first  # gradients wait, the weights are the same


async def test_new_weights_cannot_be_published_while_gradients_are_pending(adapters):
    await forward_backward(adapters, 1, batch((4,)))
    with pytest.raises(FailedPrecondition, match="pending"):
        await publish(adapters)


async def test_a_version_published_while_gradients_are_pending_has_none_of_them():
    published, stepped = [], []
    for early in (False, True):
        async with with_a() as adapters:
            adapter = adapters.get(A)
            await forward_backward(adapters, 1, batch((4, 9)))
            await optim_step(adapters, 2)
            if early:
                published.append(await publish(adapters))
            await forward_backward(adapters, 3, batch((4, 9), seed=1))
            before = adapter.view
            assert before.has_pending_gradients
            published.append(await adapter.publish(1, with_pending_gradients=True))
            assert adapter.view == before
            stepped.append((await optim_step(adapters, 4)).metrics["grad_norm"])
            stepped.append((await publish(adapters)).digest)
    async with with_a() as never:
        await forward_backward(never, 1, batch((4, 9)))
        await optim_step(never, 2)
        await forward_backward(never, 3, batch((4, 9), seed=1))
        expected = [
            (await optim_step(never, 4)).metrics["grad_norm"],
            (await publish(never)).digest,
        ]
    assert {(each.policy_version, each.digest) for each in published} == {(1, published[0].digest)}
    assert published[1] == published[2]  # free, the second time
    assert stepped == expected * 2


async def test_the_newest_versions_are_kept_and_never_change(adapters):
    digests = [await train(adapters, A, 1, seed=step) for step in range(3)]
    assert adapters.version(A, 2).digest == digests[1]
    assert adapters.version(A, 3).digest == digests[2]
    for gone in (1, 4):
        with pytest.raises(NotFound) as caught:
            adapters.version(A, gone)
        assert caught.value.context["allowed"] == "2, 3"


async def test_a_deleted_adapter_leaves_nothing_behind(adapters):
    await train(adapters, A, 2)
    adapters.delete(A, epoch=1)
    await adapters.create(A, LORA, epoch=1)
    with pytest.raises(NotFound):
        adapters.version(A, 2)
    async with with_a() as fresh:
        assert await train(adapters, A, 1) == await train(fresh, A, 1)


# --- the end -------------------------------------------------------------------------------------


async def test_a_trainer_that_drains_ends_when_it_holds_nothing(adapters):
    adapters.info()
    ending = asyncio.ensure_future(adapters.moved_away(60.0))
    await asyncio.sleep(0)
    assert adapters.info().draining
    assert not ending.done()
    adapters.delete(A, epoch=1)
    await ending


async def test_a_trainer_that_nobody_asks_does_not_wait(adapters):
    await adapters.moved_away(60.0)  # it was never asked
    assert adapters.info().held == (HeldAdapter(A, 1),)


async def test_a_trainer_drains_for_as_long_as_somebody_asks_and_no_longer_than_it_may(
    adapters, monkeypatch
):
    loop = asyncio.get_running_loop()
    now = loop.time()
    monkeypatch.setattr(loop, "time", lambda: now)
    adapters.info()
    ending = asyncio.ensure_future(adapters.moved_away(5 * SILENCE_S))
    for _ in range(5):
        for _ in range(5):
            await asyncio.sleep(0)
        assert not ending.done()
        now += 0.9 * SILENCE_S
        adapters.info()
    now += SILENCE_S
    await ending
