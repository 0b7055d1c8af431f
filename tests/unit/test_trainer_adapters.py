"""The adapters' state machine: sequences, versions, capacity, determinism, isolation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rollmesh.errors import (
    AlreadyExists,
    CapacityExhausted,
    FailedPrecondition,
    InvalidRequest,
    NonFinite,
    NotFound,
    SequenceGap,
)
from rollmesh.types import AdamConfig, LoraConfig, LossConfig
from tests.fakes.tiny_qwen3 import TARGETS, batch, tiny_adapters

A, B = "projects/p/adapters/a", "projects/p/adapters/b"
LORA = LoraConfig(4, seed=5)
SAMPLED = LossConfig("importance_sampling", 0.1)
ADAM = AdamConfig(1e-2, weight_decay=0.01, max_grad_norm=1.0)


@pytest.fixture
def adapters():
    adapters = tiny_adapters()
    adapters.create(A, LORA)
    return adapters


def train(adapters, name, steps, *, seed=0):
    """`steps` steps of two batches each; the digest of what they lead to."""
    for step in range(steps):
        sequence = adapters.get(name).next_sequence
        for part in range(2):
            data = batch((4, 9, 6), seed=seed + 2 * step + part)
            adapters.forward_backward(name, sequence + part, data, SAMPLED)
        adapters.optim_step(name, sequence + 2, ADAM)
    return adapters.publish(name).digest


def spoilt():
    """A batch whose second datum has an infinite loss."""
    data = batch((4, 6))
    data[1] = replace(data[1], sampling_logprobs=np.full(6, -1e4, np.float32))
    return data


# --- creation ------------------------------------------------------------------------------------


def test_a_fresh_adapter_tells_its_shape_with_defaults_filled_in(adapters):
    view = adapters.get(A)
    assert view.lora.alpha == 8.0
    assert set(view.lora.target_modules) == set(TARGETS)
    assert (view.policy_version, view.next_sequence, view.has_pending_gradients) == (0, 1, False)


def test_creating_the_same_again_answers_the_one_that_exists(adapters):
    train(adapters, A, 1)
    again = adapters.create(A, LoraConfig(4, alpha=8.0, target_modules=TARGETS[::-1], seed=5))
    assert again == adapters.get(A)
    assert again.policy_version == 1


@pytest.mark.parametrize(
    "other", [LoraConfig(2, seed=5), LoraConfig(4), LoraConfig(4, alpha=4.0, seed=5)]
)
def test_creating_something_else_under_a_name_that_is_taken_is_refused(adapters, other):
    with pytest.raises(AlreadyExists):
        adapters.create(A, other)


@pytest.mark.parametrize("name", ["", "a", "projects/p/adapters/..", "projects/p/adapters/A"])
def test_a_malformed_name_is_refused(adapters, name):
    with pytest.raises(InvalidRequest):
        adapters.create(name, LORA)


def test_one_adapter_too_many_is_refused_until_one_is_deleted(adapters):
    for name in (B, f"{B}2"):
        adapters.create(name, LORA)
    with pytest.raises(CapacityExhausted) as caught:
        adapters.create(f"{B}3", LORA)
    assert caught.value.context["allowed"] == "3"
    adapters.create(A, LORA)  # one that exists takes no room
    adapters.delete(B)
    adapters.delete(B)
    adapters.create(f"{B}3", LORA)
    assert adapters.info().num_adapters == 3


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda adapters: adapters.get(B), id="get"),
        pytest.param(lambda adapters: adapters.forward(B, batch((3,))), id="forward"),
        pytest.param(
            lambda adapters: adapters.forward_backward(B, 1, batch((3,)), SAMPLED),
            id="forward_backward",
        ),
        pytest.param(lambda adapters: adapters.optim_step(B, 1, ADAM), id="optim_step"),
        pytest.param(lambda adapters: adapters.publish(B), id="publish"),
        pytest.param(lambda adapters: adapters.version(B, 0), id="version"),
    ],
)
def test_an_adapter_that_is_not_held_is_not_found(adapters, ask):
    with pytest.raises(NotFound) as caught:
        ask(adapters)
    assert caught.value.context["resource"] == B


# --- sequences -----------------------------------------------------------------------------------


def test_a_repeat_of_the_newest_op_answers_its_result_and_changes_nothing(adapters):
    once = tiny_adapters()
    once.create(A, LORA)
    for name, repeats in ((once, 1), (adapters, 3)):
        for _ in range(repeats):
            result = name.forward_backward(A, 1, batch((4, 9)), SAMPLED)
        for _ in range(repeats):
            step = name.optim_step(A, 2, ADAM)
        assert step.policy_version == 1
        assert result.metrics["loss"] != 0
    assert adapters.publish(A) == once.publish(A)
    assert adapters.get(A).next_sequence == 3


def test_a_used_sequence_with_another_body_is_refused(adapters):
    adapters.forward_backward(A, 1, batch((4, 9)), SAMPLED)
    others = [
        lambda: adapters.forward_backward(A, 1, batch((4, 9), seed=1), SAMPLED),
        lambda: adapters.forward_backward(A, 1, batch((4, 9)), LossConfig("importance_sampling")),
        lambda: adapters.forward_backward(A, 1, batch((9, 4)), SAMPLED),
        lambda: adapters.optim_step(A, 1, ADAM),
    ]
    for other in others:
        with pytest.raises(AlreadyExists) as caught:
            other()
        assert caught.value.context["expected_sequence"] == "2"


@pytest.mark.parametrize("sequence", [1, 2, 5, 2**62])
def test_a_gap_names_the_expected_sequence(adapters, sequence):
    train(adapters, A, 1)
    with pytest.raises(SequenceGap) as caught:
        adapters.optim_step(A, sequence, ADAM)
    assert caught.value.context["expected_sequence"] == "4"


@pytest.mark.parametrize("sequence", [0, -1])
def test_sequences_begin_at_one(adapters, sequence):
    with pytest.raises(InvalidRequest) as caught:
        adapters.optim_step(A, sequence, ADAM)
    assert caught.value.context["field"] == "sequence"


@pytest.mark.parametrize(
    ("op", "error"),
    [
        pytest.param(
            lambda adapters, n: adapters.forward_backward(A, n, [], SAMPLED),
            InvalidRequest,
            id="bad batch",
        ),
        pytest.param(
            lambda adapters, n: adapters.forward_backward(A, n, spoilt(), SAMPLED),
            NonFinite,
            id="loss not finite",
        ),
        pytest.param(
            lambda adapters, n: adapters.optim_step(A, n, AdamConfig(float("nan"))),
            InvalidRequest,
            id="bad settings",
        ),
    ],
)
def test_a_refused_op_changes_nothing_and_does_not_use_up_its_sequence(adapters, op, error):
    clean = tiny_adapters()
    clean.create(A, LORA)
    for name in (clean, adapters):
        name.forward_backward(A, 1, batch((4, 9)), SAMPLED)
    before = adapters.get(A)
    with pytest.raises(error):
        op(adapters, 2)
    assert adapters.get(A) == before
    for name in (clean, adapters):
        name.optim_step(A, 2, ADAM)
    assert adapters.publish(A) == clean.publish(A)


def test_a_step_without_gradients_is_refused(adapters):
    with pytest.raises(FailedPrecondition, match="no pending gradients"):
        adapters.optim_step(A, 1, ADAM)
    train(adapters, A, 1)
    with pytest.raises(FailedPrecondition):
        adapters.optim_step(A, 4, ADAM)


def test_a_step_that_cannot_be_taken_clears_the_gradients_and_keeps_the_weights(adapters):
    adapters.forward_backward(A, 1, batch((4, 9)), SAMPLED)
    with pytest.raises(NonFinite):
        adapters.optim_step(A, 2, replace(ADAM, epsilon=1e-60))
    view = adapters.get(A)
    assert (view.policy_version, view.next_sequence, view.has_pending_gradients) == (0, 2, False)
    with pytest.raises(FailedPrecondition):
        adapters.optim_step(A, 2, ADAM)
    clean = tiny_adapters()
    clean.create(A, LORA)
    for name, first in ((clean, 1), (adapters, 2)):
        name.forward_backward(A, first, batch((5, 7)), SAMPLED)
        name.optim_step(A, first + 1, ADAM)
    assert adapters.publish(A) == clean.publish(A)


# --- gradients -----------------------------------------------------------------------------------


def test_two_halves_give_the_gradients_of_the_whole():
    data = batch((4, 9, 6, 3))
    norms = []
    for parts in ([data], [data[:2], data[2:]]):
        adapters = tiny_adapters()
        adapters.create(A, LORA)
        for sequence, part in enumerate(parts, start=1):
            adapters.forward_backward(A, sequence, part, SAMPLED)
        step = adapters.optim_step(A, len(parts) + 1, AdamConfig(1e-3))
        norms.append(step.metrics["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_training_lowers_the_loss(adapters):
    data = batch((8, 8, 8), sampled=False)
    found = []
    for step in range(20):
        loss = LossConfig("cross_entropy")
        result = adapters.forward_backward(A, 2 * step + 1, data, loss)
        found.append(result.metrics["loss"])
        adapters.optim_step(A, 2 * step + 2, AdamConfig(1e-2))
    assert found[-1] < 0.5 * found[0]


def test_forward_changes_nothing_and_tells_what_the_next_batch_sees(adapters):
    train(adapters, A, 1)
    before = adapters.get(A)
    data = batch((4, 9))
    seen = adapters.forward(A, data)
    assert adapters.get(A) == before
    trained = adapters.forward_backward(A, 4, data, SAMPLED).logprobs
    assert [row.tolist() for row in seen] == [row.tolist() for row in trained]


# --- determinism and isolation -------------------------------------------------------------------


def test_the_same_ops_give_the_same_bits():
    digests = []
    for _ in range(2):
        adapters = tiny_adapters()
        adapters.create(A, LORA)
        digests.append([train(adapters, A, 1, seed=step) for step in range(4)])
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 4


def test_the_ops_of_others_change_nothing(adapters):
    alone = tiny_adapters()
    alone.create(A, LORA)
    expected = [train(alone, A, 1, seed=step) for step in range(3)]
    found = []
    for step in range(3):
        adapters.create(B, LoraConfig(2, target_modules=("q_proj",), seed=step))
        train(adapters, B, 2, seed=100 + step)
        with pytest.raises(NonFinite):
            adapters.forward_backward(B, 7, spoilt(), SAMPLED)
        huge = [replace(datum, weights=datum.weights * 1e15) for datum in batch((5, 5))]
        adapters.forward_backward(B, 7, huge, SAMPLED)
        found.append(train(adapters, A, 1, seed=step))
        adapters.delete(B)
    assert found == expected


# --- versions ------------------------------------------------------------------------------------


def test_publishing_a_version_again_answers_the_same(adapters):
    assert adapters.publish(A) == adapters.publish(A)
    first = adapters.publish(A)
    adapters.forward_backward(A, 1, batch((4,)), SAMPLED)
    assert adapters.publish(A) == first  # gradients wait, the weights are the same


def test_new_weights_cannot_be_published_while_gradients_are_pending(adapters):
    adapters.forward_backward(A, 1, batch((4,)), SAMPLED)
    with pytest.raises(FailedPrecondition, match="pending"):
        adapters.publish(A)


def test_the_newest_versions_are_kept_and_never_change(adapters):
    digests = [train(adapters, A, 1, seed=step) for step in range(3)]
    assert adapters.version(A, 2).digest == digests[1]
    assert adapters.version(A, 3).digest == digests[2]
    for gone in (1, 4):
        with pytest.raises(NotFound) as caught:
            adapters.version(A, gone)
        assert caught.value.context["allowed"] == "2, 3"


def test_a_deleted_adapter_leaves_nothing_behind(adapters):
    train(adapters, A, 2)
    adapters.delete(A)
    adapters.create(A, LORA)
    with pytest.raises(NotFound):
        adapters.version(A, 2)
    fresh = tiny_adapters()
    fresh.create(A, LORA)
    assert train(adapters, A, 1) == train(fresh, A, 1)
