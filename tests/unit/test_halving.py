"""Successive halving: who is compared, when, and who goes on."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollmesh.job import FINAL_STATES, JobState
from rollmesh.sweep import HalvingSpec
from services.coordinator.halving import Contestant, compare, ordinal, rung_step


def field(*metrics: float | None, rung: int = 0) -> list[Contestant]:
    return [Contestant(number, "HELD", rung, metric) for number, metric in enumerate(metrics)]


def winners(halving: HalvingSpec, jobs: list[Contestant]) -> list[int]:
    return [verdict.number for verdict in compare(halving, jobs) if verdict.goes_on]


THREE = HalvingSpec(first_step=3)


def test_rungs_are_each_factor_times_as_late_as_the_one_before():
    assert [rung_step(THREE, rung) for rung in range(4)] == [3, 9, 27, 81]


@pytest.mark.parametrize(
    ("count", "factor", "left"),
    [(9, 3, 3), (3, 3, 1), (10, 3, 4), (4, 2, 2), (5, 2, 3), (2, 100, 1), (1, 3, 1), (256, 4, 64)],
)
def test_the_best_part_goes_on_rounded_up(count, factor, left):
    jobs = field(*(float(number) for number in range(count)))
    halving = HalvingSpec(first_step=1, factor=factor)
    assert winners(halving, jobs) == list(range(count - 1, count - 1 - left, -1))


def test_of_equal_figures_the_lower_number_is_better_and_any_is_better_than_none():
    assert winners(THREE, field(None, 0.5, 0.5)) == [1]
    assert winners(HalvingSpec(first_step=1, factor=2), field(None, -0.5, 0.1, None)) == [2, 1]


def test_where_nobody_has_a_figure_nobody_is_ended():
    verdicts = compare(THREE, field(None, None, None, rung=1))
    assert [(verdict.number, verdict.goes_on) for verdict in verdicts] == [
        (0, True),
        (1, True),
        (2, True),
    ]
    assert {verdict.reason for verdict in verdicts} == {
        "successive halving at step 9: none of 3 has a figure for evaluation, all go on"
    }


@pytest.mark.parametrize("phase", ["PENDING", "RUNNING", "PAUSING", "PAUSED"])
def test_nobody_is_judged_while_one_is_under_way(phase):
    jobs = [*field(0.1, 0.2, 0.3), Contestant(3, phase, 0, 0.9)]
    assert compare(THREE, jobs) == []


@pytest.mark.parametrize("phase", sorted(FINAL_STATES))
def test_who_has_ended_is_out_and_takes_nobodys_place(phase):
    jobs = [*field(0.1, 0.2, 0.3), Contestant(3, phase, 0, 0.9)]
    assert winners(THREE, jobs) == [2]


def test_a_reason_states_the_rule_and_the_numbers():
    reasons = [verdict.reason for verdict in compare(THREE, field(0.25, 0.5, None, 0.75, rung=1))]
    assert reasons == [
        "successive halving at step 9: evaluation 0.75 is 1st of 4, the best 2 go on",
        "successive halving at step 9: evaluation 0.5 is 2nd of 4, the best 2 go on",
        "successive halving at step 9: evaluation 0.25 is 3rd of 4, the best 2 go on",
        "successive halving at step 9: no evaluation is 4th of 4, the best 2 go on",
    ]
    (first, *_) = compare(THREE, field(1.0, 2.0))
    assert first.reason.endswith("1st of 2, the best 1 goes on")


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*get_args(JobState), "PAUSING", "HELD"]),
            st.none() | st.floats(-1e3, 1e3),
        ),
        max_size=20,
    ),
    st.integers(2, 5),
)
def test_whoever_goes_on_is_no_worse_than_whoever_does_not(drawn, factor):
    halving = HalvingSpec(first_step=1, factor=factor)
    jobs = [Contestant(n, phase, 2, metric) for n, (phase, metric) in enumerate(drawn)]
    left = {job.number: job for job in jobs if job.phase not in FINAL_STATES}
    verdicts = compare(halving, jobs)
    if not left or any(job.phase != "HELD" for job in left.values()):
        assert verdicts == []
        return
    assert sorted(verdict.number for verdict in verdicts) == sorted(left)
    on = [left[v.number].metric for v in verdicts if v.goes_on]
    out = [left[v.number].metric for v in verdicts if not v.goes_on]
    if all(job.metric is None for job in left.values()):
        assert not out
        return
    assert len(on) == math.ceil(len(left) / factor)
    told = [-math.inf if metric is None else metric for metric in on]
    assert all(min(told) >= (-math.inf if metric is None else metric) for metric in out)


def test_ordinals():
    numbers = (1, 2, 3, 4, 11, 12, 13, 21, 22, 101, 111, 256)
    assert [ordinal(number) for number in numbers] == [
        *("1st", "2nd", "3rd", "4th", "11th", "12th", "13th"),
        *("21st", "22nd", "101st", "111th", "256th"),
    ]
