"""stable_reinforce: what is left out, in which sampled sequences, and what is left of the rest."""

# ruff: noqa: N806 - as protos/ names them

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollmesh.types import LossConfig
from services.trainer.losses import metrics
from services.trainer.requests import advance, next_pass
from tests.fakes.tiny_qwen3 import batch, tiny_model
from tests.unit.test_trainer_losses import computed, data_of, drawn, left_out, oracle, rows
from tests.unit.test_trainer_model import as_peft, assert_close, flat, peft_logprobs, random_weights

PLAIN = LossConfig("stable_reinforce")
FULL = LossConfig(
    "stable_reinforce",
    0.2,
    max_importance_ratio=1.3,
    max_sequence_ratio=1.8,
    sampler_kl_coefficient=0.4,
)
each_config = pytest.mark.parametrize("config", [PLAIN, FULL], ids=["plain", "full"])


def with_ids(seed, shape=(4, 12), spread=0.5):
    values = drawn(seed, shape, spread)
    values["ids"] = np.random.default_rng(seed).integers(-1, 3, shape).astype(np.int32)
    return values


@each_config
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 12)),
    spread=st.sampled_from([1e-3, 0.3, 0.6, 3.0]),
)
def test_each_sequence_is_taken_or_left_as_a_whole_as_the_formula_says(config, seed, shape, spread):
    values = with_ids(seed, shape, spread)
    for found, expected in zip(computed(config, **values), oracle(config, **values), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "is_out"), [(1.49, False), (1.51, True), (1 / 1.49, False), (1 / 1.51, True)]
)
def test_the_guard_bounds_the_geometric_mean_on_both_sides(ratio, is_out):
    log_ratios = np.array([[3.0, -3.0, 0.0]]) + math.log(ratio)  # their ratios are far from it
    ones = np.ones((1, 3))
    _, gradients = computed(PLAIN, p=-4 * ones, w=ones, q=-4 - log_ratios, A=ones, b=ones)
    assert (gradients == 0).all() == is_out
    assert (gradients != 0).all() == (not is_out)


def test_masked_positions_and_those_of_no_sequence_are_not_in_the_mean():
    ones = np.ones((1, 4))
    values = {
        "p": -ones,
        "w": np.array([[1.0, 0.0, 1.0, 1.0]]),
        "q": np.array([[-1.0, -9e3, -9e3, -1.0]]),
        "A": ones,
        "b": ones,
        "ids": np.array([[0, 0, -1, 0]], np.int32),
    }
    loss, gradients = computed(PLAIN, **values)
    assert loss.tolist() == [2.0]
    assert gradients.tolist() == [[-1.0, 0.0, 0.0, -1.0]]


def test_the_penalty_has_a_bounded_gradient_on_both_sides():
    config = replace(PLAIN, sampler_kl_coefficient=1.0, max_sequence_ratio=1e300)
    log_ratios = np.array([[-600.0, -1.0, 0.0, 0.5, math.log(2), 600.0]])
    p, nothing, ones = np.full((1, 6), -700.0), np.zeros((1, 6)), np.ones((1, 6))
    loss, gradients = computed(config, p=p, w=ones, q=p - log_ratios, A=nothing, b=ones)
    expected = [-1.0, math.exp(-1) - 1, 0.0, math.exp(0.5) - 1, 1.0, 1.0]
    np.testing.assert_allclose(gradients[0], expected, atol=1e-15)
    assert math.isfinite(loss.item())


@each_config
def test_a_row_has_the_same_bits_alone_padded_and_beside_others(config):
    values = {
        name: value.astype(np.int32 if name == "ids" else np.float32)
        for name, value in with_ids(3, (6, 37)).items()
    }
    padded = {name: np.pad(value, ((0, 0), (0, 11))) for name, value in values.items()}
    together, gradients = computed(config, **padded)
    assert together.any()
    for i in range(6):
        alone, own = computed(config, **{name: value[i : i + 1] for name, value in values.items()})
        assert alone.tobytes() == together[i : i + 1].tobytes()
        assert own.tobytes() == gradients[i : i + 1, :37].tobytes()


@pytest.mark.parametrize("wild", [1e30, math.inf, -math.inf, math.nan])
@each_config
def test_positions_that_do_not_count_add_exactly_nothing_whatever_stands_there(config, wild):
    values = with_ids(2)
    idle = (values["w"] == 0) | (values["ids"] < 0)
    other = {**values, **{name: np.where(idle, wild, values[name]) for name in "pqAb"}}
    found, gradients = computed(config, **other)
    expected, expected_gradients = computed(config, **values)
    assert found.tolist() == expected.tolist()
    assert gradients.tolist() == expected_gradients.tolist()
    assert not gradients[idle].any()


def test_the_guarded_fraction_is_a_share_of_sequences_and_of_nothing_zero():
    values = with_ids(7, (8, 20), 0.8)
    values["w"][2] = 0
    data = [
        replace(datum, sequence_ids=ids)
        for datum, ids in zip(data_of(values), values["ids"], strict=True)
    ]

    def measured(chosen):
        data, logprobs = zip(*chosen, strict=True)
        return metrics(PLAIN, data, losses=[0.0] * len(data), logprobs=logprobs, base_logprobs=None)

    pairs = list(zip(data, rows(values["p"]), strict=True))
    found = measured(pairs)
    counts = (values["w"] != 0) & (values["ids"] >= 0)
    difference = values["p"] - values["q"]
    num_out = num_all = 0
    for ids, row, mask in zip(values["ids"], difference, counts, strict=True):
        num_out += len(left_out(PLAIN, ids[mask], row[mask]))
        num_all += len(set(ids[mask].tolist()))
    assert 0 < num_out < num_all
    assert found["guarded_fraction"] == pytest.approx(num_out / num_all)
    assert found["num_tokens"] == counts.sum()
    assert found["ratio_max"] == pytest.approx(np.exp(difference[counts]).max(), rel=1e-5)
    assert measured([pairs[2]])["guarded_fraction"] == 0


# --- through the model ---------------------------------------------------------------------------


def sampled(model, weights, seed=0, lengths=(12, 3, 30, 7)):
    """Data drawn by nearly this policy, with one sequence in each that is drawn by another."""
    rng = np.random.default_rng(seed)
    data = batch(lengths, seed=seed)
    request = model.request(weights, data, None)
    while request.next_unit is not None:
        advance(next_pass([request], model.max_batch_tokens), model.run_pass)
    found = []
    for datum, logprobs in zip(data, request.logprobs(), strict=True):
        ids = rng.integers(-1, 3, len(logprobs)).astype(np.int32)
        q = logprobs + rng.normal(0, 0.3, len(logprobs)) - 2.0 * (ids == 2)
        found.append(
            replace(datum, sampling_logprobs=np.minimum(q, 0).astype(np.float32), sequence_ids=ids)
        )
    return found


@each_config
def test_gradients_through_the_model_are_those_of_float64_autograd(config):
    model = tiny_model(max_batch_tokens=64)
    weights = random_weights(model)
    data = sampled(model, weights)
    found = model.forward_backward(weights, data, config)

    peft, factors = as_peft(weights)
    peft.double()
    limit, bound = config.max_importance_ratio or 2.0, config.max_sequence_ratio or 1.5
    loss, num_out, num_all = torch.zeros((), dtype=torch.float64), 0, 0
    for datum in data:
        p = peft_logprobs(peft, datum)
        q, A, w = (
            torch.tensor(values).double()
            for values in (datum.sampling_logprobs, datum.advantages, datum.weights)
        )
        with torch.no_grad(), peft.disable_adapter():
            b = peft_logprobs(peft, datum)
        for each in range(3):
            at = torch.tensor((datum.sequence_ids == each) & (datum.weights != 0))
            if not at.any():
                continue
            num_all += 1
            ratio = (p - q).detach()[at].mean().exp()
            if not 1 / bound <= ratio <= bound:
                num_out += 1
                continue
            r = (p - q).detach().exp().clamp(max=limit)
            terms = -r * p * A
            surrogate = (r - 1) * p  # its gradient is that of the penalty
            value = (r - 1 - r.log()).detach()
            kappa = config.sampler_kl_coefficient or 0.0
            terms = terms + kappa * (value + surrogate - surrogate.detach())
            if config.kl_coefficient:
                terms = terms + config.kl_coefficient * (torch.exp(b - p) - (b - p) - 1)
            loss = loss + (w * terms)[at].sum()
    assert 0 < num_out < num_all
    assert found.metrics["guarded_fraction"] == pytest.approx(num_out / num_all)
    assert found.metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert_close(found.gradients, torch.autograd.grad(loss, factors), tolerance=3e-5)


def test_several_adapters_in_one_pass_have_the_bits_that_they_have_alone():
    model = tiny_model(max_batch_tokens=1024)
    configs = [PLAIN, FULL, LossConfig("gspo"), replace(PLAIN, max_sequence_ratio=1.01)]

    def request(index):
        config, weights = configs[index], random_weights(model, seed=index, rank=index + 1)
        data = sampled(model, weights, seed=index)
        if config.loss == "gspo":
            data = [replace(datum, sequence_ids=None) for datum in data]
        return model.request(weights, data, config)

    def run(requests):
        passes = 0
        while waiting := [request for request in requests if request.next_unit is not None]:
            advance(next_pass(waiting, 1024), model.run_pass)
            passes += 1
        found = [request.gradients({}) for request in requests]
        return passes, [
            (
                flat(each.gradients).numpy().tobytes(),
                [logprobs.tobytes() for logprobs in each.logprobs],
                each.metrics,
            )
            for each in found
        ]

    passes, together = run([request(index) for index in range(4)])
    assert passes == 1
    assert together == [run([request(index)])[1][0] for index in range(4)]
    assert {metrics.get("guarded_fraction", 0) > 0 for _, _, metrics in together} == {True, False}
