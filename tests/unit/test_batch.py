"""Groups to training data."""

from __future__ import annotations

import numpy as np
import pytest

from rollmesh.job import AlgorithmSpec
from rollmesh.types import Completion, PolicySpan
from services.coordinator.batch import batch
from services.coordinator.datasets import Task
from services.coordinator.rollouts import Drawn, Group


def group(*lengths, rewards, prompt=(7, 8, 9), number=0):
    completions = [
        Completion(
            token_ids=tuple(range(100, 100 + length)),
            logprobs=tuple(-0.25 * n for n in range(1, length + 1)),
            spans=(PolicySpan(length, 0, "d"),),
            stop_reason="stop",
        )
        for length in lengths
    ]
    return Group(number, 0, Drawn(Task("t", {}), prompt, completions), rewards, 0.0, 0.0)


def test_a_datum_says_for_each_completion_token_what_it_was_and_how_likely():
    (first, _) = batch([group(2, 1, rewards=[1, 0])], AlgorithmSpec(), max_tokens=None)
    half = np.float32(1 / np.sqrt(2))
    assert first.token_ids.tolist() == [7, 8, 9, 100]
    assert first.target_token_ids.tolist() == [8, 9, 100, 101]
    assert first.weights.tolist() == [0, 0, 0.25, 0.25]
    assert first.sampling_logprobs.tolist() == [0, 0, -0.25, -0.5]
    assert first.advantages.tolist() == pytest.approx([0, 0, half, half], abs=1e-5)
    assert {array.dtype.name for array in (first.token_ids, first.target_token_ids)} == {"int32"}
    floats = (first.weights, first.sampling_logprobs, first.advantages)
    assert {array.dtype.name for array in floats} == {"float32"}


def test_a_prompt_of_one_token_leaves_nothing_to_mask():
    data = batch([group(1, 1, rewards=[1, 0], prompt=(7,))], AlgorithmSpec(), max_tokens=None)
    assert [datum.token_ids.tolist() for datum in data] == [[7], [7]]
    assert [datum.weights.tolist() for datum in data] == [[0.5], [0.5]]


@pytest.mark.parametrize(
    ("kl_coefficient", "second_group", "num_data", "weight"),
    [
        pytest.param(0.0, [1, 0], 4, 1 / 4, id="both teach"),
        pytest.param(0.0, [1, 1], 2, 1 / 4, id="one is left out, the weights stay"),
        pytest.param(0.1, [1, 1], 4, 1 / 4, id="a KL penalty needs all"),
    ],
)
def test_rollouts_whose_gradient_is_zero_are_left_out(
    kl_coefficient, second_group, num_data, weight
):
    groups = [group(1, 1, rewards=[0, 1]), group(1, 1, rewards=second_group, number=1)]
    data = batch(groups, AlgorithmSpec(kl_coefficient=kl_coefficient), max_tokens=None)
    assert len(data) == num_data
    assert {datum.weights.max() for datum in data} == {np.float32(weight)}


def test_where_nothing_teaches_everything_stays_so_that_the_step_can_be_taken():
    data = batch([group(1, 1, rewards=[1, 1])], AlgorithmSpec(), max_tokens=None)
    assert len(data) == 2
    assert not any(datum.advantages.any() for datum in data)


def test_a_logprob_above_zero_by_rounding_is_zero():
    over = group(1, 1, rewards=[0, 1])
    object.__setattr__(over.drawn.completions[0], "logprobs", (1e-7,))
    (first, _) = batch([over], AlgorithmSpec(), max_tokens=None)
    assert first.sampling_logprobs.max() == 0.0
