"""Advantages and token weights against plain float arithmetic."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.coordinator.advantages import STD_EPSILON, advantages, token_weights

REWARDS = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=32)


def oracle(estimator, rewards):
    if len(set(rewards)) == 1:
        return [0.0 for _ in rewards]
    mean = math.fsum(rewards) / len(rewards)
    if estimator == "grpo":
        std = statistics.stdev(rewards)
        return [(reward - mean) / (std + STD_EPSILON) for reward in rewards]
    if estimator == "dr_grpo":
        return [reward - mean for reward in rewards]
    total = math.fsum(rewards)
    return [reward - (total - reward) / (len(rewards) - 1) for reward in rewards]


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@settings(deadline=None)
@given(rewards=REWARDS)
def test_advantages_are_those_of_the_formula(estimator, rewards):
    found = advantages(estimator, rewards).tolist()
    assert found == pytest.approx(oracle(estimator, rewards), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, -7.0])
def test_equal_rewards_give_exactly_nothing(estimator, reward):
    assert advantages(estimator, [reward] * 7).tolist() == [0.0] * 7


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("grpo", [0.7071, -0.7071]), ("dr_grpo", [0.5, -0.5]), ("rloo", [1.0, -1.0])],
)
def test_one_right_and_one_wrong_rollout(estimator, expected):
    assert advantages(estimator, [1.0, 0.0]).tolist() == pytest.approx(expected, abs=1e-4)


def test_grpo_weighs_every_rollout_the_same_whatever_its_length():
    lengths = [1, 4, 10]
    weights = token_weights("grpo", lengths, max_tokens=100)
    assert (weights * lengths).tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("estimator", ["dr_grpo", "rloo"])
@pytest.mark.parametrize(("max_tokens", "constant"), [(100, 100), (None, 10)])
def test_the_others_weigh_every_token_the_same(estimator, max_tokens, constant):
    weights = token_weights(estimator, [1, 4, 10], max_tokens=max_tokens)
    assert weights.tolist() == pytest.approx([1 / (3 * constant)] * 3)
