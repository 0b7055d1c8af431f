"""The life of a job as one table: what each command does to a job in each phase.

A phase is a state, but for PAUSING: that is RUNNING, to be paused when its step is over. A pair
that is not in the table is refused. Pure: the store applies a move and writes the event.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from rollmesh.errors import FailedPrecondition
from rollmesh.job import FINAL_STATES, JobState

if TYPE_CHECKING:
    from collections.abc import Mapping

Phase = JobState | Literal["PAUSING"]
Command = Literal["start", "settle", "finish", "fail", "pause", "resume", "cancel"]
"""The last three are the user's, the others the runner's. `settle`: the loop returned at the border
between two steps because it was asked to pause."""


@dataclass(frozen=True, slots=True)
class Move:
    """Where a command takes a job, and the reason unless the command brings its own."""

    to: Phase
    reason: str = ""


MOVES: Mapping[tuple[Command, Phase], Move | None] = MappingProxyType(
    {
        ("start", "PENDING"): Move("RUNNING"),
        # The successor of a coordinator that died goes on with what it finds running.
        ("start", "RUNNING"): Move("RUNNING"),
        ("start", "PAUSING"): None,
        # Resumed before the loop came to the border: it goes on.
        ("settle", "RUNNING"): None,
        ("settle", "PAUSING"): Move("PAUSED", "paused"),
        ("finish", "RUNNING"): Move("SUCCEEDED"),
        ("finish", "PAUSING"): Move("SUCCEEDED"),
        ("fail", "PENDING"): Move("FAILED"),
        ("fail", "RUNNING"): Move("FAILED"),
        ("fail", "PAUSING"): Move("FAILED"),
        ("pause", "PENDING"): Move("PAUSED", "paused"),
        ("pause", "RUNNING"): Move("PAUSING", "pauses when the step that it is in is over"),
        ("pause", "PAUSING"): None,
        ("pause", "PAUSED"): None,
        ("resume", "PENDING"): None,
        ("resume", "RUNNING"): None,
        ("resume", "PAUSING"): Move("RUNNING"),
        ("resume", "PAUSED"): Move("PENDING", "resumed"),
        ("cancel", "PENDING"): Move("CANCELLED", "cancelled"),
        ("cancel", "RUNNING"): Move("CANCELLED", "cancelled"),
        ("cancel", "PAUSING"): Move("CANCELLED", "cancelled"),
        ("cancel", "PAUSED"): Move("CANCELLED", "cancelled"),
        ("cancel", "CANCELLED"): None,
    }
)
"""None: the job is left as it is."""


def state_of(phase: Phase) -> JobState:
    """The state that the world sees."""
    return "RUNNING" if phase == "PAUSING" else phase


def move(job: str, command: Command, phase: Phase) -> Move | None:
    """What `command` does to the job of that name; None: nothing.

    Raises:
        FailedPrecondition: not in this phase; the context says `state`.
    """
    try:
        return MOVES[command, phase]
    except KeyError:
        state = state_of(phase)
        why = "it has ended" if state in FINAL_STATES else "it does not run"
        raise FailedPrecondition(
            f"cannot {command} {job}: {why}, its state is {state}", resource=job, state=state
        ) from None
