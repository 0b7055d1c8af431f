"""AdamW against the formulas of its paper in float64 numpy, and against torch's own."""

from __future__ import annotations

import math

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


def test_twenty_steps_with_changing_settings_are_those_of_torch():
    rng = np.random.default_rng(7)
    reference = [torch.nn.Parameter(tensor) for tensor in tensors(0)]
    adamw = torch.optim.AdamW(reference)
    parameters, state = tensors(0), fresh_state(tensors(0))
    for number in range(20):
        config = AdamConfig(
            learning_rate=10 ** rng.uniform(-4, -1),
            beta1=rng.uniform(0.5, 0.95),
            beta2=rng.uniform(0.8, 0.999),
            epsilon=10 ** rng.uniform(-12, -4),
            weight_decay=rng.choice([0.0, 0.1]),
            max_grad_norm=rng.choice([None, 0.1, 1e9]),
        )
        gradients = tensors(number, scale=10 ** rng.uniform(-3, 3))
        step = adam_step(parameters, gradients, state, config)
        adamw.param_groups[0].update(
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )
        for parameter, gradient in zip(reference, gradients, strict=True):
            parameter.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(reference, config.max_grad_norm or math.inf)
        adamw.step()
        assert step.grad_norm == pytest.approx(norm.item(), rel=1e-6)
        # clip_grad_norm_ adds 1e-6 to the norm.
        for found, expected in zip(step.parameters, reference, strict=True):
            torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
        parameters, state = step.parameters, step.state


def test_the_same_step_gives_the_same_bits():
    state = adam_step(tensors(0), tensors(1), fresh_state(tensors(0)), AdamConfig(1e-2)).state
    config = AdamConfig(1e-2, weight_decay=0.1, max_grad_norm=0.5)
    one, two = (adam_step(tensors(0), tensors(2), state, config) for _ in range(2))
    assert one.grad_norm == two.grad_norm
    pairs = [
        (one.parameters, two.parameters),
        (one.state.first_moments, two.state.first_moments),
        (one.state.second_moments, two.state.second_moments),
    ]
    assert all(torch.equal(a, b) for left, right in pairs for a, b in zip(left, right, strict=True))


def test_gradients_are_scaled_down_to_the_norm_and_never_up():
    state = fresh_state(tensors(0))
    gradients = tensors(1)
    norm = adam_step(tensors(0), gradients, state, AdamConfig(1e-2)).grad_norm
    for max_norm, scale in ((norm / 4, 0.25), (norm, 1.0), (norm * 4, 1.0)):
        step = adam_step(tensors(0), gradients, state, AdamConfig(1e-2, max_grad_norm=max_norm))
        assert step.grad_norm == norm
        for moment, gradient in zip(step.state.first_moments, gradients, strict=True):
            torch.testing.assert_close(moment, 0.1 * scale * gradient)


def test_the_norm_of_huge_finite_gradients_is_finite():
    step = adam_step(
        tensors(0), tensors(1, 1e25), fresh_state(tensors(0)), AdamConfig(0.0, max_grad_norm=1.0)
    )
    assert np.isfinite(step.grad_norm)
    assert step.grad_norm > 1e25


@pytest.mark.parametrize(
    ("spoilt", "config", "says"),
    [
        pytest.param(float("nan"), AdamConfig(1e-3), "the gradient is", id="NaN gradient"),
        pytest.param(float("inf"), AdamConfig(1e-3), "the gradient is", id="infinite gradient"),
        pytest.param(0.0, AdamConfig(1e-3, epsilon=1e-60), "epsilon=1e-60", id="epsilon vanishes"),
        pytest.param(1e25, AdamConfig(1e-3), "a step with", id="second moment overflows"),
        pytest.param(
            1.0, AdamConfig(1e17, weight_decay=1e17), "a step with", id="weights overflow"
        ),
    ],
)
def test_a_step_that_cannot_be_taken_leaves_everything_as_it_was(spoilt, config, says):
    parameters, gradients = tensors(0, 1e5), tensors(1)
    state = adam_step(parameters, tensors(2), fresh_state(parameters), AdamConfig(1e-3)).state
    if spoilt == 0.0:
        state = fresh_state(parameters)
    gradients[0][0, 0] = spoilt
    passed_in = [*parameters, *gradients, *state.first_moments, *state.second_moments]
    before = [tensor.clone() for tensor in passed_in]
    unchanged = "the adapter and its pending gradients are as they were"
    with pytest.raises(NonFinite, match=f"{says}.*not finite; {unchanged}"):
        adam_step(parameters, gradients, state, config)
    for now, then in zip(passed_in, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
