"""Groups to training data."""

from __future__ import annotations

import numpy as np
import pytest

from rollmesh.types import Completion, PolicySpan
from services.coordinator.batch import batch, teacher_metrics, teaching
from services.coordinator.datasets import Task
from services.coordinator.groups import Group, Rollout, Turn
from tests.fakes.job_mesh import spec

JOB = spec()


def group(*lengths, rewards, prompt=(7, 8, 9), number=0, teacher=None):
    completions = [
        Completion(
            token_ids=tuple(range(100, 100 + length)),
            logprobs=tuple(-0.25 * n for n in range(1, length + 1)),
            spans=(PolicySpan(length, 0, "d"),),
            stop_reason="stop",
        )
        for length in lengths
    ]
    rollouts = [
        Rollout([Turn(prompt, completion)], reward)
        for completion, reward in zip(completions, rewards, strict=True)
    ]
    return Group(number, 0, Task("t", {}), rollouts, 0.0, 0.0, teacher_logprobs=teacher)


def test_a_datum_says_for_each_completion_token_what_it_was_and_how_likely():
    (first, _) = batch([group(2, 1, rewards=[1, 0])], JOB)
    half = np.float32(1 / np.sqrt(2))
    assert first.token_ids.tolist() == [7, 8, 9, 100]
    assert first.target_token_ids.tolist() == [8, 9, 100, 101]
    assert first.weights.tolist() == [0, 0, 0.25, 0.25]
    assert first.sampling_logprobs.tolist() == [0, 0, -0.25, -0.5]
    assert first.advantages.tolist() == pytest.approx([0, 0, half, half], abs=1e-5)
    assert {array.dtype.name for array in (first.token_ids, first.target_token_ids)} == {"int32"}
    floats = (first.weights, first.sampling_logprobs, first.advantages)
    assert {array.dtype.name for array in floats} == {"float32"}


def test_of_several_turns_only_what_the_policy_drew_is_trained_on():
    spans = (PolicySpan(1, 0, "d"),)
    turns = [
        Turn([7, 8], Completion((100, 101), (-0.1, -0.2), spans * 2, "stop")),
        Turn([9], Completion((102,), (-0.3,), spans, "stop")),
    ]
    played = Group(0, 0, Task("t", {}), [Rollout(turns, 1.0), Rollout(turns[:1], 0.0)], 0.0, 0.0)
    first, second = batch([played], JOB)
    assert first.token_ids.tolist() == [7, 8, 100, 101, 9]
    assert first.target_token_ids.tolist() == [8, 100, 101, 9, 102]
    assert (first.weights > 0).tolist() == [False, True, True, False, True]
    assert first.weights[first.weights > 0].tolist() == [np.float32(1 / (2 * 3))] * 3
    drawn_at = np.float32([0, -0.1, -0.2, 0, -0.3])
    assert first.sampling_logprobs.tolist() == drawn_at.tolist()
    assert (first.advantages != 0).tolist() == [False, True, True, False, True]
    assert second.target_token_ids.tolist() == [8, 100, 101]


def test_a_prompt_of_one_token_leaves_nothing_to_mask():
    data = batch([group(1, 1, rewards=[1, 0], prompt=(7,))], JOB)
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
    data = batch(groups, spec(algorithm={"kl_coefficient": kl_coefficient}))
    assert len(data) == num_data
    assert {datum.weights.max() for datum in data} == {np.float32(weight)}


def test_where_nothing_teaches_everything_stays_so_that_the_step_can_be_taken():
    data = batch([group(1, 1, rewards=[1, 1])], JOB)
    assert len(data) == 2
    assert not any(datum.advantages.any() for datum in data)


def test_a_logprob_above_zero_by_rounding_is_zero():
    over = group(1, 1, rewards=[0, 1])
    object.__setattr__(over.rollouts[0].turns[0].completion, "logprobs", (1e-7,))
    (first, _) = batch([over], JOB)
    assert first.sampling_logprobs.max() == 0.0


def test_a_group_with_equal_rewards_teaches_where_the_baseline_is_the_steps():
    of = enumerate([[1, 1], [0, 0], [0, 1]])
    groups = [group(1, 1, rewards=rewards, number=number) for number, rewards in of]
    job = spec(algorithm={"advantage": "reinforce"})
    assert teaching(groups, job.algorithm) == groups
    assert teaching(groups, JOB.algorithm) == groups[2:]
    found = [datum.advantages[-1] for datum in batch(groups, job)]
    assert found == pytest.approx([1, 1, -1, -1, -1, 1], abs=1e-5)


def test_a_teacher_gives_each_token_an_advantage_of_its_own_beside_the_rewards():
    # Drawn at -0.25 and -0.5, and at -0.25.
    judged = group(2, 1, rewards=[1, 0], teacher=[[-0.5, -0.25], [-1.25]])
    job = spec(distillation={"coefficient": 2.0}, algorithm={"advantage": "dr_grpo"})
    first, second = batch([judged], job)
    assert first.advantages.tolist() == [0, 0, 0.5 + 2 * -0.25, 0.5 + 2 * 0.25]
    assert second.advantages.tolist() == [0, 0, -0.5 + 2 * -1.0]
    assert first.sampling_logprobs.tolist() == [0, 0, -0.25, -0.5]
    assert teacher_metrics([judged]) == {"kl_teacher": pytest.approx(1 / 3)}
    assert teacher_metrics([group(2, rewards=[1])]) == {}


def test_under_a_teacher_a_group_with_equal_rewards_teaches_beside_others():
    equal = group(1, 1, rewards=[1, 1], teacher=[[-1.0], [-1.0]])
    other = group(1, 1, rewards=[0, 1], teacher=[[-1.0], [-1.0]], number=1)
    job = spec(distillation={})
    assert teaching([equal, other], job.algorithm) == [equal, other]
    assert len(batch([equal, other], job)) == 4


def test_a_teacher_needs_no_reward():
    silent = group(1, 1, rewards=[0.0, 0.0], teacher=[[-1.0], [-0.25]])
    other = group(1, 1, rewards=[0.0, 0.0], teacher=[[-0.5], [-0.5]], number=1)
    job = spec(distillation={}, reward=None)
    assert teaching([silent, other], job.algorithm) == [silent, other]
    found = [datum.advantages[-1] for datum in batch([silent, other], job)]
    assert found == [-0.75, 0.0, -0.25, -0.25]


def test_what_is_given_is_averaged_over_all_tokens_and_has_no_advantage():
    given = [group(3, rewards=[0.0]), group(1, rewards=[0.0], number=1)]
    first, second = batch(given, spec(sft={"completion": "{answer}"}))
    assert first.weights.tolist() == [0, 0, 0.25, 0.25, 0.25]
    assert second.weights.tolist() == [0, 0, 0.25]
    assert first.target_token_ids.tolist() == [8, 9, 100, 101, 102]
    assert first.advantages is None
    assert first.sampling_logprobs is None
