"""Advantages and token weights against plain float arithmetic."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.coordinator.advantages import STD_EPSILON, of_batch, of_group, token_weights

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
    found = of_group(estimator, rewards).tolist()
    assert found == pytest.approx(oracle(estimator, rewards), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, -7.0])
def test_equal_rewards_give_exactly_nothing(estimator, reward):
    assert of_group(estimator, [reward] * 7).tolist() == [0.0] * 7


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("grpo", [0.7071, -0.7071]), ("dr_grpo", [0.5, -0.5]), ("rloo", [1.0, -1.0])],
)
def test_one_right_and_one_wrong_rollout(estimator, expected):
    assert of_group(estimator, [1.0, 0.0]).tolist() == pytest.approx(expected, abs=1e-4)


@settings(deadline=None)
@given(groups=st.lists(REWARDS, min_size=1, max_size=5))
def test_reinforce_compares_with_the_whole_step(groups):
    rewards = [reward for group in groups for reward in group]
    mean, std = math.fsum(rewards) / len(rewards), statistics.pstdev(rewards)
    equal = len(set(rewards)) == 1
    expected = [0.0 if equal else (each - mean) / (std + STD_EPSILON) for each in rewards]
    assert of_batch("reinforce", groups).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_group_with_equal_rewards_is_above_or_below_the_baseline_of_the_step():
    # Mean 1/2, and the population's standard deviation is 1/2 too.
    found = of_batch("reinforce", [[1.0, 1.0], [0.0, 0.0]]).tolist()
    assert found == pytest.approx([1.0, 1.0, -1.0, -1.0], abs=1e-5)
    assert of_batch("reinforce", [[1 / 3] * 3, [1 / 3] * 4]).tolist() == [0.0] * 7
    assert of_batch("grpo", [[1.0, 1.0], [0.0, 0.0]]).tolist() == [0.0] * 4


def test_grpo_weighs_every_rollout_the_same_whatever_its_length():
    lengths = [1, 4, 10]
    weights = token_weights("grpo", lengths, max_tokens=100)
    assert (weights * lengths).tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("estimator", ["dr_grpo", "rloo", "reinforce"])
@pytest.mark.parametrize(("max_tokens", "constant"), [(100, 100), (None, 10)])
def test_the_others_weigh_every_token_the_same(estimator, max_tokens, constant):
    weights = token_weights(estimator, [1, 4, 10], max_tokens=max_tokens)
    assert weights.tolist() == pytest.approx([1 / (3 * constant)] * 3)
