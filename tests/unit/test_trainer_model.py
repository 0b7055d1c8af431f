"""Passes over the base model, measured against peft on the same weights."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model

from rollmesh.errors import InvalidRequest, NonFinite, Unavailable
from rollmesh.types import LossConfig
from services.trainer.config import TrainerConfig
from services.trainer.model import Model, load
from tests.fakes.tiny_qwen3 import MAX_LENGTH, TARGETS, batch, tiny_model, tiny_qwen3

LENGTHS = (5, 12, 1, 7, 12, 3)
CONFIGS = [
    pytest.param(LossConfig("cross_entropy"), id="cross_entropy"),
    pytest.param(LossConfig("importance_sampling"), id="importance_sampling"),
    pytest.param(LossConfig("importance_sampling", 0.2), id="importance_sampling with KL"),
]


def random_weights(model, *, rank=4, targets=TARGETS, seed=3, scale=0.1):
    """An adapter in the middle of its training: B is not zero."""
    fresh = model.lora.fresh(rank=rank, alpha=8.0, target_modules=targets, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return fresh.replaced(
        [p + scale * torch.randn(p.shape, generator=generator) for p in fresh.parameters()]
    )


def as_peft(weights, *, rank=4, targets=TARGETS):
    """The tiny model with `weights` on it by peft's own hand."""
    peft = get_peft_model(
        tiny_qwen3(), PeftLoraConfig(r=rank, lora_alpha=8, target_modules=list(targets))
    )
    modules = dict(peft.base_model.model.named_modules())
    for name, (a, b) in weights.factors.items():
        modules[name].lora_A["default"].weight.data.copy_(a)
        modules[name].lora_B["default"].weight.data.copy_(b)
    peft.eval()
    return peft, [
        factor
        for name in weights.factors
        for factor in (
            modules[name].lora_A["default"].weight,
            modules[name].lora_B["default"].weight,
        )
    ]


def peft_logprobs(peft, datum):
    ids = torch.tensor(datum.token_ids[None].astype(np.int64))
    logprobs = torch.log_softmax(peft(input_ids=ids).logits[0], dim=-1)
    return logprobs[torch.arange(ids.shape[1]), torch.tensor(datum.target_token_ids).long()]


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def assert_close(found, expected, tolerance=1e-5):
    """Relative to the whole, as rounding errors are."""
    found, expected = flat(found), flat(expected)
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "down_proj")], ids=["all", "two"])
@pytest.mark.parametrize("config", CONFIGS)
def test_logprobs_and_gradients_are_those_of_peft(config, targets):
    model = tiny_model(max_batch_tokens=24)
    weights = random_weights(model, targets=targets)
    data = batch(LENGTHS, sampled=config.loss == "importance_sampling")
    found = model.forward_backward(weights, data, config)

    peft, factors = as_peft(weights, targets=targets)
    loss = torch.zeros(())
    for datum, logprobs in zip(data, found.logprobs, strict=True):
        p = peft_logprobs(peft, datum)
        np.testing.assert_allclose(logprobs, p.detach(), rtol=1e-5, atol=1e-5)
        w = torch.tensor(datum.weights)
        if config.loss == "cross_entropy":
            loss = loss - (w * p).sum()
        else:
            q, advantages = torch.tensor(datum.sampling_logprobs), torch.tensor(datum.advantages)
            loss = loss - (w * torch.exp(p - q) * advantages).sum()
        if config.kl_coefficient:
            with torch.no_grad(), peft.disable_adapter():
                d = peft_logprobs(peft, datum)
            loss = loss + config.kl_coefficient * (w * (torch.exp(d - p) - (d - p) - 1)).sum()
    assert found.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_close(found.gradients, torch.autograd.grad(loss, factors))


def test_cross_entropy_with_negative_weights_has_the_gradients_of_any_loss_of_the_logprobs():
    """A loss that the client computes itself, from the log-probabilities of a Forward."""
    model = tiny_model(max_batch_tokens=24)
    weights, data = random_weights(model), batch(LENGTHS, sampled=False)

    def own_loss(logprobs):
        every = torch.cat(list(logprobs))
        return ((every + 3) ** 2).sum() - 9 * torch.logsumexp(every, 0)

    leaves = [torch.tensor(p, requires_grad=True) for p in model.forward(weights, data)]
    by_logprob = torch.autograd.grad(own_loss(leaves), leaves)
    linear = [
        replace(datum, weights=-gradient.numpy())
        for datum, gradient in zip(data, by_logprob, strict=True)
    ]
    signs = np.sign(np.concatenate([datum.weights for datum in linear]))
    assert set(signs.tolist()) == {-1, 1}
    found = model.forward_backward(weights, linear, LossConfig("cross_entropy"))

    peft, factors = as_peft(weights)
    loss = own_loss([peft_logprobs(peft, datum) for datum in data])
    assert_close(found.gradients, torch.autograd.grad(loss, factors), tolerance=2e-5)


def test_a_fresh_adapter_is_the_base_model():
    model = tiny_model()
    weights = model.lora.fresh(rank=4, alpha=8.0, target_modules=TARGETS, seed=0)
    found = model.forward_backward(weights, batch(LENGTHS), LossConfig("importance_sampling", 0.0))
    assert found.metrics["kl_base"] == 0
    assert found.metrics["num_tokens"] == sum(length - length // 3 for length in LENGTHS)


def test_on_policy_ratios_are_exactly_one():
    model = tiny_model()
    weights = random_weights(model)
    data = batch(LENGTHS)
    on_policy = [
        replace(datum, sampling_logprobs=logprobs)
        for datum, logprobs in zip(data, model.forward(weights, data), strict=True)
    ]
    found = model.forward_backward(weights, on_policy, LossConfig("importance_sampling")).metrics
    assert (found["ratio_mean"], found["ratio_max"], found["kl_sampler"]) == (1, 1, 0)


def test_factors_are_drawn_as_peft_draws_them_and_from_their_seed_alone():
    model = tiny_model()
    names = {"rank": 8, "alpha": 16.0, "target_modules": TARGETS}
    state = torch.random.get_rng_state()
    first = model.lora.fresh(**names, seed=1)
    model.lora.fresh(**names, seed=2)
    again = model.lora.fresh(**names, seed=1)
    assert torch.equal(flat(first.parameters()), flat(again.parameters()))
    assert not torch.equal(
        flat(first.parameters()), flat(model.lora.fresh(**names, seed=2).parameters())
    )
    assert torch.equal(state, torch.random.get_rng_state())
    for a, b in first.factors.values():
        bound = 1 / math.sqrt(a.shape[1])  # kaiming-uniform with a = √5
        assert 0.8 * bound < a.abs().max() <= bound
        assert not b.any()


@pytest.mark.parametrize("config", CONFIGS)
def test_cutting_a_batch_into_passes_changes_rounding_alone(config):
    data = batch(LENGTHS, sampled=config.loss == "importance_sampling")
    whole, cut = tiny_model(max_batch_tokens=256), tiny_model(max_batch_tokens=12)
    expected = whole.forward_backward(random_weights(whole), data, config)
    found = cut.forward_backward(random_weights(cut), data, config)
    assert_close(found.gradients, expected.gradients)
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)


def test_a_passes_budget_bounds_the_longest_sequence():
    assert tiny_model(max_batch_tokens=256).max_length == MAX_LENGTH
    assert tiny_model(max_batch_tokens=20).max_length == 20


def test_masked_data_have_gradients_of_exactly_zero():
    model = tiny_model()
    data = [
        replace(datum, weights=np.zeros_like(datum.weights), advantages=datum.advantages * 1e30)
        for datum in batch(LENGTHS)
    ]
    found = model.forward_backward(
        random_weights(model), data, LossConfig("importance_sampling", 1.0)
    )
    assert not flat(found.gradients).any()


def test_dropout_of_the_base_model_is_off():
    model = Model(tiny_qwen3(attention_dropout=0.9).train(), max_batch_tokens=64)
    weights, data = random_weights(model), batch((9,))
    plain = tiny_model(max_batch_tokens=64)
    assert model.forward(weights, data)[0].tolist() == plain.forward(weights, data)[0].tolist()


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        pytest.param({"sampling_logprobs": np.full(7, -1e4, np.float32)}, "loss", id="loss"),
        pytest.param({"weights": np.full(7, 2e36, np.float32)}, "gradient", id="gradient"),
    ],
)
def test_the_datum_whose_loss_or_gradient_is_not_finite_is_named(spoil, what):
    model = tiny_model()
    data = batch(LENGTHS)
    data[3] = replace(data[3], **spoil)
    with pytest.raises(NonFinite, match=f"its {what}") as caught:
        model.forward_backward(
            random_weights(model, scale=3), data, LossConfig("importance_sampling")
        )
    assert caught.value.context["field"] == "data[3]"


def test_a_bfloat16_base_takes_float32_adapters():
    exact = tiny_model()
    rounded = Model(tiny_qwen3().to(torch.bfloat16), max_batch_tokens=256)
    data = batch(LENGTHS)
    config = LossConfig("importance_sampling", 0.1)
    expected = exact.forward_backward(random_weights(exact), data, config)
    found = rounded.forward_backward(random_weights(rounded), data, config)
    assert {gradient.dtype for gradient in found.gradients} == {torch.float32}
    assert {logprobs.dtype for logprobs in found.logprobs} == {np.dtype(np.float32)}
    assert_close(found.gradients, expected.gradients, tolerance=0.1)


def test_a_model_that_is_stopped_ends_a_batch_before_its_next_pass():
    module, passes = tiny_qwen3(), []
    model = Model(module, max_batch_tokens=12)

    def stop(*_):
        passes.append(1)
        model.stop()

    module.register_forward_hook(stop)
    with pytest.raises(Unavailable):
        model.forward_backward(random_weights(model), batch(LENGTHS), LossConfig("cross_entropy"))
    assert len(passes) == 1


@pytest.fixture
def folder(tmp_path):
    tiny_qwen3().to(torch.bfloat16).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_local_folder_is_loaded_in_the_configured_precision(folder, dtype):
    values = {"base_model": {"name": "tiny", "path": str(folder)}, "dtype": dtype, "num_threads": 1}
    model = load(TrainerConfig.parse(values, source="test"))
    assert (model.vocab_size, model.max_length) == (24, MAX_LENGTH)
    logprobs = model.forward(random_weights(model), batch((9,)))[0]
    exact = tiny_model()
    np.testing.assert_allclose(
        logprobs, exact.forward(random_weights(exact), batch((9,)))[0], atol=0.3
    )


def test_a_base_model_that_cannot_be_loaded_is_named(tmp_path):
    values = {"base_model": {"name": "tiny", "path": str(tmp_path)}}
    with pytest.raises(InvalidRequest, match=str(tmp_path)) as caught:
        load(TrainerConfig.parse(values, source="test"))
    assert caught.value.context["field"] == "base_model.path"
