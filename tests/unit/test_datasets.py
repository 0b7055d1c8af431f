"""Generators of tasks: splits, determinism, refusals."""

from __future__ import annotations

import pytest

from rollmesh.errors import InvalidRequest
from services.coordinator.datasets import Task, arithmetic, generate

EVERY_TWO_DIGIT_PROBLEM = 2 * 100 * 100


def questions(tasks: list[Task]) -> list[str]:
    return [task.fields["question"] for task in tasks]


def test_the_splits_never_overlap_and_leave_nothing_out():
    train = set(questions(arithmetic(seed=1, count=EVERY_TWO_DIGIT_PROBLEM, split="train")))
    heldout = set(questions(arithmetic(seed=2, count=EVERY_TWO_DIGIT_PROBLEM, split="heldout")))
    assert not train & heldout
    assert len(train) + len(heldout) == EVERY_TWO_DIGIT_PROBLEM
    assert 0.08 < len(heldout) / EVERY_TWO_DIGIT_PROBLEM < 0.12


def test_the_splits_are_the_same_on_every_machine():
    assert questions(arithmetic(seed=0, count=3, split="train")) == ["63-11", "6+63", "42+42"]
    assert questions(arithmetic(seed=0, count=2, split="heldout")) == ["68-90", "24-7"]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_same_seed_gives_the_same_tasks_and_another_seed_gives_others(split):
    tasks = arithmetic(seed=5, count=50, split=split)
    assert tasks == arithmetic(seed=5, count=50, split=split)
    assert tasks != arithmetic(seed=6, count=50, split=split)


@pytest.mark.parametrize("max_digits", [1, 2, 5, 9])
@pytest.mark.parametrize("operations", [("+",), ("-",), ("+", "-")])
def test_every_answer_is_right_and_every_operand_short_enough(max_digits, operations):
    tasks = arithmetic(
        seed=0, count=40, split="train", max_digits=max_digits, operations=operations
    )
    for task in tasks:
        sign = next(sign for sign in "+-" if sign in task.fields["question"])
        a, b = task.fields["question"].split(sign)
        assert sign in operations
        assert max(len(a), len(b)) <= max_digits
        assert int(task.fields["answer"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


def test_a_longer_draw_starts_with_the_shorter_one():
    assert arithmetic(seed=3, count=90, split="train")[:30] == arithmetic(
        seed=3, count=30, split="train"
    )


def test_no_problem_repeats_before_all_were_drawn():
    everything = set(questions(arithmetic(seed=0, count=1000, split="heldout", max_digits=1)))
    tasks = arithmetic(seed=4, count=2 * len(everything), split="heldout", max_digits=1)
    assert set(questions(tasks[: len(everything)])) == everything
    assert set(questions(tasks[len(everything) :])) == everything


def test_equal_problems_have_equal_ids_and_different_ones_do_not():
    tasks = arithmetic(seed=0, count=500, split="heldout", max_digits=1)
    assert len({task.id for task in tasks}) == len(set(questions(tasks)))


def test_generate_finds_the_generator_by_name():
    parameters = {"count": 7, "split": "heldout", "operations": ["-"]}
    assert generate("arithmetic", parameters, seed=9) == arithmetic(
        seed=9, count=7, split="heldout", operations=["-"]
    )


def test_whole_numbers_may_come_as_floats():
    parameters = {"count": 7.0, "split": "train", "max_digits": 3.0}
    assert generate("arithmetic", parameters, seed=9) == arithmetic(
        seed=9, count=7, split="train", max_digits=3
    )


def refusal(name: str, parameters: dict[str, object]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        generate(name, parameters, seed=0)
    return caught.value


def test_an_unknown_generator_is_refused_by_naming_the_known_ones():
    error = refusal("arithmetics", {})
    assert error.context["field"] == "generator"
    assert error.context["value"] == "arithmetics"
    assert "'arithmetic'" in str(error)


@pytest.mark.parametrize(
    ("change", "field", "allowed"),
    [
        pytest.param({"count": 0}, "count", "from 1", id="no tasks"),
        pytest.param({"count": 10**7}, "count", "to 100000", id="too many tasks"),
        pytest.param({"count": 2.5}, "count", "integer", id="half a task"),
        pytest.param({"count": float("inf")}, "count", "integer", id="endless"),
        pytest.param({"count": True}, "count", "integer", id="a truth value"),
        pytest.param({"count": "8"}, "count", "integer", id="a string"),
        pytest.param({"split": "test"}, "split", "'train', 'heldout'", id="unknown split"),
        pytest.param({"split": ["train"]}, "split", "'train', 'heldout'", id="list of splits"),
        pytest.param({"max_digits": 0}, "max_digits", "from 1 to 9", id="no digits"),
        pytest.param({"max_digits": 10}, "max_digits", "from 1 to 9", id="too many digits"),
        pytest.param({"operations": []}, "operations", "'+', '-'", id="no operations"),
        pytest.param({"operations": ["*"]}, "operations", "'+', '-'", id="unknown operation"),
        pytest.param({"operations": ["+", "+"]}, "operations", "each once", id="twice the same"),
        pytest.param({"operations": [["+"]]}, "operations", "'+', '-'", id="nested operations"),
        pytest.param({"operations": 3}, "operations", "'+', '-'", id="a number of operations"),
        pytest.param({"digits": 3}, "parameters", "'max_digits'", id="unknown parameter"),
        pytest.param({"seed": 3}, "parameters", "'count'", id="the seed is no parameter"),
    ],
)
def test_a_bad_parameter_is_refused_by_naming_what_is_allowed(change, field, allowed):
    error = refusal("arithmetic", {"count": 4, "split": "train"} | change)
    assert error.context["field"] == field
    assert allowed in str(error)


@pytest.mark.parametrize("missing", ["count", "split"])
def test_a_missing_parameter_is_named(missing):
    parameters = {"count": 4, "split": "train"}
    del parameters[missing]
    error = refusal("arithmetic", parameters)
    assert error.context["field"] == missing
    assert repr(missing) in str(error)
