"""Forward with a loss: what ForwardBackward would report, without gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rollmesh.errors import InvalidRequest, NonFinite
from rollmesh.types import AdamConfig, LoraConfig, LossConfig
from services.trainer.requests import advance, next_pass
from tests.fakes.tiny_qwen3 import batch, tiny_adapters, tiny_model
from tests.unit.test_trainer_model import random_weights

A = "projects/p/adapters/a"
LENGTHS = (5, 12, 1, 7, 12, 3, 30)
CONFIGS = [
    LossConfig("cross_entropy"),
    LossConfig("cross_entropy", 0.0, entropy=True),
    LossConfig("importance_sampling", 0.2, max_importance_ratio=2.0),
    LossConfig("ppo", temperature=0.7, entropy=True),
    LossConfig("cispo", 0.3),
    LossConfig("dro"),
    LossConfig("gspo", max_importance_ratio=1.5),
    LossConfig("stable_reinforce", 0.1, max_sequence_ratio=9.0, sampler_kl_coefficient=0.1),
]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.loss)


def data_for(config, seed=0):
    return batch(LENGTHS, seed=seed, sampled=config.loss != "cross_entropy")


def bits(logprobs, metrics):
    return [row.tobytes() for row in logprobs], metrics


@each_config
def test_a_loss_alone_has_the_bits_of_one_with_gradients(config):
    model = tiny_model(max_batch_tokens=64)
    weights, data = random_weights(model), data_for(config)
    expected = model.forward_backward(weights, data, config)
    request = model.request(weights, data, config, backward=False)
    while request.next_unit is not None:
        advance(next_pass([request], model.max_batch_tokens), model.run_pass)
    result = request.result({})
    assert bits(result.logprobs, result.metrics) == bits(expected.logprobs, expected.metrics)


def test_losses_and_bare_logprobs_share_passes_and_keep_their_bits():
    model = tiny_model(max_batch_tokens=1024)

    def request(index):
        config = [*CONFIGS, None][index]
        data = batch(
            (12, 3, 30), seed=index, sampled=config is None or config.loss != "cross_entropy"
        )
        weights = random_weights(model, seed=index, rank=index + 1)
        return model.request(weights, data, config, backward=False)

    def run(requests):
        passes = 0
        while waiting := [request for request in requests if request.next_unit is not None]:
            advance(next_pass(waiting, 1024), model.run_pass)
            passes += 1
        results = [request.result({}) for request in requests]
        return passes, [bits(result.logprobs, result.metrics) for result in results]

    count = len(CONFIGS) + 1
    passes, together = run([request(index) for index in range(count)])
    assert passes == 1
    assert together == [run([request(index)])[1][0] for index in range(count)]
    assert [bool(metrics) for _, metrics in together] == [True] * len(CONFIGS) + [False]


def test_a_loss_alone_costs_no_gradients():
    model = tiny_model(max_batch_tokens=64)
    config = LossConfig("ppo", 0.1)
    request = model.request(random_weights(model), data_for(config), config, backward=False)
    part = request.part(request.take())
    [outcome] = model.run_pass([part])
    assert outcome.losses_B is not None
    assert outcome.gradient is None
    assert not part.gradients


@each_config
async def test_an_adapter_is_as_it_was_and_its_next_batch_reports_the_same(config):
    data = data_for(config)
    async with tiny_adapters() as adapters:
        await adapters.create(A, LoraConfig(4, seed=5), epoch=1)
        adapter = adapters.get(A)
        await adapter.forward_backward(1, 1, data_for(config, 1), config)
        await adapter.optim_step(1, 2, AdamConfig(1e-2))
        await adapter.forward_backward(1, 3, data_for(config, 2), config)  # stays pending
        before = adapter.view
        seen = await adapter.forward(data, config=config)
        assert adapter.view == before
        trained = await adapter.forward_backward(1, 4, data, config)
        assert seen.metrics.keys() == trained.metrics.keys()
        times = {"queued_s", "run_s"}
        for name in seen.metrics.keys() - times:
            assert seen.metrics[name] == trained.metrics[name]
        assert bits(seen.logprobs, {}) == bits(trained.logprobs, {})
        assert min(seen.metrics[name] for name in times) >= 0


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"config": LossConfig("ppo"), "temperature": 0.5}, "temperature"),
        ({"config": LossConfig("dro", beta=-1)}, "loss_config.beta"),
        ({"config": LossConfig("cross_entropy")}, "data[0].sampling_logprobs"),
    ],
)
async def test_what_forward_backward_refuses_is_refused(options, field):
    async with tiny_adapters() as adapters:
        await adapters.create(A, LoraConfig(4), epoch=1)
        with pytest.raises(InvalidRequest) as caught:
            await adapters.get(A).forward(batch((3,)), **options)
        assert caught.value.context["field"] == field


async def test_a_loss_that_is_not_finite_fails_and_names_the_datum():
    good, bad = batch((4, 9))
    bad = replace(bad, sampling_logprobs=np.full(9, -1e4, np.float32))
    async with tiny_adapters() as adapters:
        await adapters.create(A, LoraConfig(4), epoch=1)
        with pytest.raises(NonFinite) as caught:
            await adapters.get(A).forward([good, bad], config=LossConfig("importance_sampling"))
        assert caught.value.context["field"] == "data[1]"
