"""The losses against formulas written out anew in float64 numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rollmesh.types import Datum, LossConfig
from services.trainer.losses import losses, metrics

CONFIGS = [
    pytest.param(LossConfig("cross_entropy"), id="cross_entropy"),
    pytest.param(LossConfig("cross_entropy", 0.3), id="cross_entropy with KL"),
    pytest.param(LossConfig("importance_sampling"), id="importance_sampling"),
    pytest.param(LossConfig("importance_sampling", 0.0), id="KL measured only"),
    pytest.param(LossConfig("importance_sampling", 0.3), id="importance_sampling with KL"),
]
SHAPE = (3, 5)


@pytest.fixture
def values():
    rng = np.random.default_rng(1)
    weights = rng.uniform(0.2, 2, SHAPE)
    weights[0, :3] = weights[2, 1:] = 0
    return {
        "p": rng.uniform(-4, -0.1, SHAPE),
        "w": weights,
        "q": rng.uniform(-4, -0.1, SHAPE),
        "A": rng.normal(size=SHAPE),
        "r": rng.uniform(-4, -0.1, SHAPE),
    }


def oracle(config, p, w, q, A, r):  # noqa: N803 - as protos/ names them
    total = []
    for row in range(SHAPE[0]):
        loss = 0.0
        for t in range(SHAPE[1]):
            if config.loss == "cross_entropy":
                loss -= w[row, t] * p[row, t]
            else:
                loss -= w[row, t] * math.exp(p[row, t] - q[row, t]) * A[row, t]
            if config.kl_coefficient:
                d = r[row, t] - p[row, t]
                loss += config.kl_coefficient * w[row, t] * (math.exp(d) - d - 1)
        total.append(loss)
    return np.array(total)


def computed(config, p, w, q, A, r):  # noqa: N803 - as above
    return losses(
        config,
        torch.as_tensor(p),
        weights_BT=torch.as_tensor(w),
        sampling_logprobs_BT=torch.as_tensor(q),
        advantages_BT=torch.as_tensor(A),
        base_logprobs_BT=None if config.kl_coefficient is None else torch.as_tensor(r),
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_losses_are_the_sums_that_the_contract_says(config, values):
    np.testing.assert_allclose(computed(config, **values), oracle(config, **values), rtol=1e-12)


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_are_those_of_finite_differences(config, values):
    p = torch.tensor(values["p"], requires_grad=True)
    computed(config, **{**values, "p": p}).sum().backward()
    for place in np.ndindex(SHAPE):
        step = np.zeros(SHAPE)
        step[place] = 1e-6
        up = oracle(config, **{**values, "p": values["p"] + step}).sum()
        down = oracle(config, **{**values, "p": values["p"] - step}).sum()
        assert p.grad[place].item() == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_masked_position_adds_exactly_nothing_whatever_stands_there(config, values):
    masked = values["w"] == 0
    wild = {**values, "p": values["p"].copy(), "q": values["q"].copy(), "A": values["A"].copy()}
    wild["p"][masked], wild["q"][masked], wild["A"][masked] = -1e3, -1e30, 1e30
    p = torch.tensor(wild["p"], requires_grad=True)
    found = computed(config, **{**wild, "p": p})
    found.sum().backward()
    assert found.tolist() == computed(config, **values).tolist()
    assert (p.grad.numpy()[masked] == 0).all()


def test_metrics_are_means_over_positions_with_weight():
    datum = Datum(
        token_ids=np.zeros(3, np.int32),
        target_token_ids=np.zeros(3, np.int32),
        weights=np.array([0, 1, 2], np.float32),
        sampling_logprobs=np.array([0, -1, -2], np.float32),
        advantages=np.ones(3, np.float32),
    )
    found = metrics(
        LossConfig("importance_sampling", 0.0),
        [datum],
        losses=[-3.5],
        logprobs=[np.array([-9, -1.5, -1], np.float32)],
        base_logprobs=[np.array([-9, -1.5, -2], np.float32)],
    )
    k3 = [math.exp(-0.5) - 0.5, math.e - 2]
    assert found == pytest.approx(
        {
            "loss": -3.5,
            "num_tokens": 2,
            "kl_sampler": sum(k3) / 2,
            "ratio_mean": (math.exp(-0.5) + math.e) / 2,
            "ratio_max": math.e,
            "kl_base": math.exp(-1) / 2,
        }
    )


def test_a_batch_without_weight_has_means_of_zero():
    nothing = np.zeros(1, np.float32)
    datum = Datum(np.zeros(1, np.int32), np.zeros(1, np.int32), nothing, nothing, nothing)
    config = LossConfig("importance_sampling", 1.0)
    found = metrics(config, [datum], losses=[0.0], logprobs=[nothing - 1], base_logprobs=[nothing])
    assert set(found.values()) == {0.0}
