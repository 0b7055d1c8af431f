"""The life of a job as one table: what each command does to a job in each phase.

A phase is a state, but for two. PAUSING is RUNNING, to be paused when its step is over. HELD is
PAUSED, to be gone on with not by its user but once the jobs of its sweep were compared. A pair that
is not in the table is refused. Pure: the store applies a move and writes the event.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from rollmesh.errors import FailedPrecondition
from rollmesh.job import FINAL_STATES, JobState

if TYPE_CHECKING:
    from collections.abc import Mapping

Phase = JobState | Literal["PAUSING", "HELD"]
Command = Literal[
    "start", "settle", "hold", "release", "finish", "fail", "pause", "resume", "cancel"
]
"""The last three are the user's, `release` is the sweep's, the others are the runner's. `settle`:
the loop returned at the border between two steps because it was asked to pause. `hold`: it did
because the jobs of its sweep are compared there."""


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
        ("hold", "RUNNING"): Move("HELD"),
        # Its user's wish goes first: resumed, it comes to the same border and is held there.
        ("hold", "PAUSING"): Move("PAUSED", "paused"),
        ("release", "HELD"): Move("PENDING"),
        ("finish", "RUNNING"): Move("SUCCEEDED"),
        ("finish", "PAUSING"): Move("SUCCEEDED"),
        ("fail", "PENDING"): Move("FAILED"),
        ("fail", "RUNNING"): Move("FAILED"),
        ("fail", "PAUSING"): Move("FAILED"),
        ("pause", "PENDING"): Move("PAUSED", "paused"),
        ("pause", "RUNNING"): Move("PAUSING", "pauses when the step that it is in is over"),
        ("pause", "PAUSING"): None,
        ("pause", "PAUSED"): None,
        ("pause", "HELD"): Move("PAUSED", "paused"),
        ("resume", "PENDING"): None,
        ("resume", "RUNNING"): None,
        ("resume", "PAUSING"): Move("RUNNING"),
        ("resume", "PAUSED"): Move("PENDING", "resumed"),
        ("resume", "HELD"): None,
        ("cancel", "PENDING"): Move("CANCELLED", "cancelled"),
        ("cancel", "RUNNING"): Move("CANCELLED", "cancelled"),
        ("cancel", "PAUSING"): Move("CANCELLED", "cancelled"),
        ("cancel", "PAUSED"): Move("CANCELLED", "cancelled"),
        ("cancel", "HELD"): Move("CANCELLED", "cancelled"),
        ("cancel", "CANCELLED"): None,
    }
)
"""None: the job is left as it is."""


def state_of(phase: Phase) -> JobState:
    """The state that the world sees."""
    match phase:
        case "PAUSING":
            return "RUNNING"
        case "HELD":
            return "PAUSED"
    return phase


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
