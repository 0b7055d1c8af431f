"""Temperature of the distribution that is trained: against peft in float64, and bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rollmesh.errors import InvalidRequest
from rollmesh.types import LoraConfig, LossConfig
from services.trainer.checks import check_loss
from services.trainer.losses import losses
from services.trainer.requests import Request, advance, next_pass
from tests.fakes.tiny_qwen3 import batch, tiny_adapters, tiny_model
from tests.unit.test_trainer_model import as_peft, assert_close, flat, random_weights

LENGTHS = (5, 12, 1, 7, 12, 3)
CONFIGS = [
    LossConfig("cross_entropy"),
    LossConfig("importance_sampling", 0.2),
    LossConfig("ppo"),
    LossConfig("cispo"),
    LossConfig("dro", 0.3),
    LossConfig("gspo"),
    LossConfig("stable_reinforce", 0.1, max_sequence_ratio=1e6, sampler_kl_coefficient=0.1),
]


def exact_logits(peft, datum):
    ids = torch.tensor(datum.token_ids[None].astype(np.int64))
    return peft(input_ids=ids).logits[0]


@pytest.mark.parametrize("temperature", [0.3, 1.7])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.loss)
def test_losses_gradients_and_metrics_are_those_of_the_tempered_softmax(config, temperature):
    config = replace(config, temperature=temperature, entropy=True)
    model = tiny_model(max_batch_tokens=24)
    weights = random_weights(model)
    data = batch(LENGTHS, sampled=config.loss != "cross_entropy")
    found = model.forward_backward(weights, data, config)

    peft, factors = as_peft(weights)
    peft.double()
    total, kl, entropy = torch.zeros((), dtype=torch.float64), [], []
    for datum, logprobs in zip(data, found.logprobs, strict=True):
        targets = torch.tensor(datum.target_token_ids).long()[:, None]
        tempered = torch.log_softmax(exact_logits(peft, datum) / temperature, dim=-1)
        p = tempered.gather(-1, targets)[:, 0]
        np.testing.assert_allclose(logprobs, p.detach(), rtol=1e-5, atol=1e-5)
        with torch.no_grad(), peft.disable_adapter():
            base = torch.log_softmax(exact_logits(peft, datum) / temperature, dim=-1)
            b = base.gather(-1, targets)[:, 0]
        arrays = {
            "weights_BT": datum.weights,
            "sampling_logprobs_BT": datum.sampling_logprobs,
            "advantages_BT": datum.advantages,
        }
        given = {
            name: torch.zeros(1, len(p)) if array is None else torch.tensor(array)[None]
            for name, array in arrays.items()
        }
        total = total + losses(config, p[None], base_logprobs_BT=b[None], **given).sum()
        counts = datum.weights > 0
        difference = (b - p).detach()[counts]
        kl.append(torch.exp(difference) - difference - 1)
        entropy.append(-(tempered.exp() * tempered).sum(-1).detach()[counts])
    assert found.metrics["loss"] == pytest.approx(total.item(), rel=1e-4, abs=1e-5)
    assert found.metrics["entropy"] == pytest.approx(torch.cat(entropy).mean().item(), rel=1e-5)
    if config.kl_coefficient is not None:
        assert found.metrics["kl_base"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    assert_close(found.gradients, torch.autograd.grad(total, factors), tolerance=3e-5)


def bits(found):
    return (
        flat(found.gradients).numpy().tobytes(),
        [logprobs.tobytes() for logprobs in found.logprobs],
        found.metrics,
    )


def test_without_a_temperature_bits_are_those_of_one_and_of_no_other():
    model = tiny_model()
    weights, data = random_weights(model), batch(LENGTHS)
    config = LossConfig("importance_sampling", 0.2, entropy=True)
    absent, one, other = (
        bits(model.forward_backward(weights, data, replace(config, temperature=temperature)))
        for temperature in (None, 1.0, 1.01)
    )
    assert absent == one
    assert absent[0] != other[0]


def test_forward_computes_what_forward_backward_does_at_the_same_temperature():
    model = tiny_model()
    weights, data = random_weights(model), batch(LENGTHS)
    at = {temperature: model.forward(weights, data, temperature) for temperature in (None, 0.6)}
    for temperature, logprobs in at.items():
        config = LossConfig("importance_sampling", temperature=temperature)
        on_policy = [
            replace(datum, sampling_logprobs=own) for datum, own in zip(data, logprobs, strict=True)
        ]
        found = model.forward_backward(weights, on_policy, config)
        assert (found.metrics["ratio_mean"], found.metrics["ratio_max"]) == (1, 1)
    assert (np.concatenate(at[None]) != np.concatenate(at[0.6])).all()


@pytest.mark.parametrize("kind", ["backward", "loss", "logprobs"])
def test_adapters_of_several_temperatures_in_one_pass_have_the_bits_they_have_alone(kind):
    model = tiny_model(max_batch_tokens=1024)
    temperatures = (0.5, None, 1e-30, 2.0, 1e-45)

    def request(index):
        temperature = temperatures[index]
        config = LossConfig("importance_sampling", 0.1, entropy=True, temperature=temperature)
        return Request(
            random_weights(model, seed=index, rank=index + 1),
            batch((20, 32, 9), seed=index),
            None if kind == "logprobs" else config,
            max_length=32,
            max_tokens=64,
            temperature=temperature,
            backward=kind == "backward",
        )

    def outcome(request):
        if request.error is not None:
            return str(request.error)
        if kind == "backward":
            return bits(request.gradients({}))
        result = request.result({})
        return [logprobs.tobytes() for logprobs in result.logprobs], result.metrics

    def run(requests):
        waiting = list(requests)
        passes = 0
        while waiting:
            advance(next_pass(waiting, 1024), model.run_pass)
            passes += 1
            waiting = [request for request in waiting if request.next_unit is not None]
        return passes, [outcome(request) for request in requests]

    passes, together = run([request(index) for index in range(5)])
    assert passes == 1
    alone = [run([request(index)])[1][0] for index in range(5)]
    assert together == alone
    assert not any(isinstance(found, str) for found in (together[0], together[1], together[3]))


@pytest.mark.parametrize("temperature", [0.0, -0.5, 2.01, float("nan"), float("inf")])
async def test_a_temperature_out_of_range_is_refused_by_name(temperature):
    for loss in ("cross_entropy", "gspo"):
        with pytest.raises(InvalidRequest) as caught:
            check_loss(LossConfig(loss, temperature=temperature))
        assert caught.value.context["field"] == "loss_config.temperature"
        assert caught.value.context["allowed"] == "finite, > 0, ≤ 2"
    async with tiny_adapters() as adapters:
        name = "projects/p/adapters/a"
        await adapters.create(name, LoraConfig(rank=2), epoch=1)
        with pytest.raises(InvalidRequest) as caught:
            await adapters.get(name).forward(batch((3,)), temperature)
        assert caught.value.context["field"] == "temperature"


@pytest.mark.parametrize("loss", ["cross_entropy", "dro", "ppo"])
def test_every_loss_takes_a_temperature(loss):
    for temperature in (1e-3, 1.0, 2.0):
        check_loss(LossConfig(loss, temperature=temperature))
