"""The life of a job, command by command and phase by phase."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollmesh.errors import FailedPrecondition
from rollmesh.job import FINAL_STATES, JobState
from services.coordinator.lifecycle import Command, move, state_of

PHASES = [*get_args(JobState), "PAUSING", "HELD"]
COMMANDS = list(get_args(Command))
STAYS, REFUSED = "stays", "refused"

# Columns: what each command does to a job in the phase of the row.
LIFE = """
           start    settle   hold     release  finish     fail     pause    resume   cancel
PENDING    RUNNING  refused  refused  refused  refused    FAILED   PAUSED   stays    CANCELLED
RUNNING    RUNNING  stays    HELD     refused  SUCCEEDED  FAILED   PAUSING  stays    CANCELLED
PAUSING    stays    PAUSED   PAUSED   refused  SUCCEEDED  FAILED   stays    RUNNING  CANCELLED
PAUSED     refused  refused  refused  refused  refused    refused  stays    PENDING  CANCELLED
HELD       refused  refused  refused  PENDING  refused    refused  PAUSED   stays    CANCELLED
SUCCEEDED  refused  refused  refused  refused  refused    refused  refused  refused  refused
FAILED     refused  refused  refused  refused  refused    refused  refused  refused  refused
CANCELLED  refused  refused  refused  refused  refused    refused  refused  refused  stays
"""
HEADER, *ROWS = [line.split() for line in LIFE.strip().splitlines()]
CASES = [
    pytest.param(command, phase, outcome, id=f"{command}-{phase}")
    for phase, *outcomes in ROWS
    for command, outcome in zip(HEADER, outcomes, strict=True)
]


def test_the_cases_below_are_all_there_are():
    assert len(CASES) == len(PHASES) * len(COMMANDS)
    assert {row[0] for row in ROWS} == set(PHASES)
    assert set(HEADER) == set(COMMANDS)


@pytest.mark.parametrize(("command", "phase", "outcome"), CASES)
def test_what_a_command_does(command, phase, outcome):
    if outcome == REFUSED:
        with pytest.raises(FailedPrecondition, match=state_of(phase)) as refusal:
            move("projects/p/jobs/j", command, phase)
        assert refusal.value.context == {
            "resource": "projects/p/jobs/j",
            "state": state_of(phase),
        }
    else:
        moved = move("projects/p/jobs/j", command, phase)
        assert (STAYS if moved is None else moved.to) == outcome


@given(st.lists(st.sampled_from(COMMANDS)))
def test_no_job_leaves_a_final_state_or_begins_without_its_turn(commands):
    phase = "PENDING"
    for command in commands:
        try:
            moved = move("projects/p/jobs/j", command, phase)
        except FailedPrecondition:
            continue
        after = phase if moved is None else moved.to
        if phase in FINAL_STATES:
            assert after == phase
        if after == "RUNNING" and phase in {"PENDING", "PAUSED", "HELD"}:
            assert command == "start"
        if phase == "HELD" and after == "PENDING":
            assert command == "release"
        phase = after
