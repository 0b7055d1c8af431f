"""Batches cut into units and put together again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollmesh.types import LossConfig
from services.trainer.requests import Request, advance
from tests.fakes.tiny_qwen3 import TARGETS, batch, tiny_model

CONFIG = LossConfig("importance_sampling", kl_coefficient=0.2, entropy=True)


def weights(model):
    fresh = model.lora.fresh(rank=4, alpha=8.0, target_modules=TARGETS, seed=3)
    generator = torch.Generator().manual_seed(3)
    return fresh.replaced(
        [p + 0.1 * torch.randn(p.shape, generator=generator) for p in fresh.parameters()]
    )


def flat(found):
    return torch.cat([gradient.flatten() for gradient in found.gradients])


def test_a_batch_cut_into_units_gives_what_it_gives_whole():
    model = tiny_model(max_batch_tokens=1024)
    lengths, data = (5, 12, 1, 7, 12, 3), batch((5, 12, 1, 7, 12, 3))
    whole = model.forward_backward(weights(model), data, CONFIG)
    for max_tokens in (32, 64, 96):
        request = Request(weights(model), data, CONFIG, max_length=32, max_tokens=max_tokens)
        while (unit := request.next_unit) is not None:
            advance([(request, request.take())], model.run_pass)
            assert unit.num_tokens <= max_tokens
        found = request.gradients({})
        assert (flat(found) - flat(whole)).norm() <= 1e-5 * flat(whole).norm()
        assert [len(logprobs) for logprobs in found.logprobs] == list(lengths)
        for one, other in zip(found.logprobs, whole.logprobs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        assert found.metrics == pytest.approx(whole.metrics, rel=1e-4)


def test_two_batches_of_half_the_data_add_up_to_one_of_the_whole():
    model = tiny_model()
    data = batch((5, 12, 1, 7, 12, 3))
    whole, *halves = [
        model.forward_backward(weights(model), part, CONFIG) for part in (data, data[:3], data[3:])
    ]
    total = sum(flat(half) for half in halves)
    assert (total - flat(whole)).norm() <= 1e-5 * flat(whole).norm()
    assert whole.metrics["loss"] == pytest.approx(sum(half.metrics["loss"] for half in halves))


def test_entropies_are_those_of_the_policy_at_counted_positions():
    model = tiny_model()
    fresh = model.lora.fresh(rank=1, alpha=1.0, target_modules=TARGETS, seed=0)
    entropy = model.forward_backward(fresh, batch((9, 20)), CONFIG).metrics["entropy"]
    assert 0 < entropy < np.log(model.vocab_size)
