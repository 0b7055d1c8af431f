"""AdamW against the formulas of its paper in float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollmesh.errors import NonFinite
from rollmesh.types import AdamConfig
from services.trainer.optimizer import adam_step, fresh_state

SHAPES = ((3, 4), (5,))


def tensors(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.normal(size=shape) * scale, dtype=torch.float32) for shape in SHAPES]


def test_steps_with_changing_settings_follow_adamw():
    configs = [
        AdamConfig(1e-2),
        AdamConfig(3e-3, beta1=0.8, beta2=0.99, epsilon=1e-6, weight_decay=0.1),
        AdamConfig(1e-2, max_grad_norm=0.5),
        AdamConfig(0.0, weight_decay=0.1),
    ]
    parameters, state = tensors(0), fresh_state(tensors(0))
    expected = [p.double().numpy() for p in parameters]
    first, second = [0.0, 0.0], [0.0, 0.0]
    for number, config in enumerate(configs, start=1):
        gradients = tensors(number)
        step = adam_step(parameters, gradients, state, config)
        norm = np.sqrt(sum((g.double().numpy() ** 2).sum() for g in gradients))
        assert step.grad_norm == pytest.approx(norm)
        clip = min(1.0, (config.max_grad_norm or np.inf) / norm)
        for i, gradient in enumerate(gradients):
            g = gradient.double().numpy() * clip
            first[i] = config.beta1 * first[i] + (1 - config.beta1) * g
            second[i] = config.beta2 * second[i] + (1 - config.beta2) * g**2
            m = first[i] / (1 - config.beta1**number)
            v = second[i] / (1 - config.beta2**number)
            expected[i] = expected[i] * (1 - config.learning_rate * config.weight_decay)
            expected[i] = expected[i] - config.learning_rate * m / (np.sqrt(v) + config.epsilon)
            np.testing.assert_allclose(step.parameters[i], expected[i], rtol=2e-5, atol=1e-6)
        parameters, state = step.parameters, step.state
    assert state.step == len(configs)


def test_the_norm_of_huge_finite_gradients_is_finite():
    step = adam_step(
        tensors(0), tensors(1, 1e25), fresh_state(tensors(0)), AdamConfig(0.0, max_grad_norm=1.0)
    )
    assert np.isfinite(step.grad_norm)
    assert step.grad_norm > 1e25


@pytest.mark.parametrize(
    ("spoilt", "config"),
    [
        pytest.param(float("nan"), AdamConfig(1e-3), id="NaN gradient"),
        pytest.param(float("inf"), AdamConfig(1e-3), id="infinite gradient"),
        pytest.param(0.0, AdamConfig(1e-3, epsilon=1e-60), id="epsilon is 0 in float32"),
        pytest.param(1e25, AdamConfig(1e-3), id="second moment overflows"),
    ],
)
def test_a_step_that_cannot_be_taken_leaves_everything_as_it_was(spoilt, config):
    parameters, gradients = tensors(0), tensors(1)
    gradients[0][0, 0] = spoilt
    state = fresh_state(parameters)
    with pytest.raises(NonFinite):
        adam_step(parameters, gradients, state, config)
    assert all(torch.equal(a, b) for a, b in zip(parameters, tensors(0), strict=True))
    assert not any(moment.any() for moment in (*state.first_moments, *state.second_moments))
