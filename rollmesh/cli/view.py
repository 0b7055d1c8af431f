"""The live view of a job: what is known of it as a value that events advance, and its picture."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.bar import Bar
from rich.console import Group
from rich.table import Table
from rich.text import Text

from rollmesh.cli.follow import ConnectionLost
from rollmesh.cli.lines import IN_TURN, METRICS, evaluation_text
from rollmesh.cli.output import one_line
from rollmesh.job import EvaluationCompleted, Job, JobEvent, StateChanged, StepCompleted, Warned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

STEPS_SHOWN = 60
RECENT_STEPS = 10
"""Phases are means over this many steps."""
EVALUATIONS_SHOWN = 6
WARNINGS_SHOWN = 3
BAR_WIDTH = 24
STATE_STYLES = {"SUCCEEDED": "bold green", "FAILED": "bold red", "CANCELLED": "bold yellow"}


@dataclass(frozen=True, slots=True)
class JobView:
    """What the view knows; bounded, however long the job."""

    name: str
    max_steps: int
    state: str
    reason: str = ""
    first_time: float = 0.0
    last_time: float = 0.0
    steps: tuple[StepCompleted, ...] = ()
    evaluations: tuple[EvaluationCompleted, ...] = ()
    warnings: tuple[Warned, ...] = ()
    num_warnings: int = 0
    connection: ConnectionLost | None = None

    @classmethod
    def of(cls, job: Job) -> JobView:
        """The view of a job before its first event."""
        return cls(job.name, job.spec.stop.max_steps, job.state, job.state_reason)

    def after(self, item: JobEvent | ConnectionLost) -> JobView:
        """The view once `item` has happened."""
        if isinstance(item, ConnectionLost):
            return dataclasses.replace(self, connection=item)
        now = dataclasses.replace(
            self, connection=None, first_time=self.first_time or item.time, last_time=item.time
        )
        match item.event:
            case StateChanged(to_state=state, reason=reason):
                return dataclasses.replace(now, state=state, reason=reason)
            case StepCompleted() as step:
                return dataclasses.replace(now, steps=(*self.steps, step)[-STEPS_SHOWN:])
            case EvaluationCompleted() as evaluation:
                return dataclasses.replace(now, evaluations=_kept(self.evaluations, evaluation))
            case Warned() as warning:
                return dataclasses.replace(
                    now,
                    warnings=(*self.warnings, warning)[-WARNINGS_SHOWN:],
                    num_warnings=self.num_warnings + 1,
                )

    def __rich__(self) -> RenderableType:
        """The picture: at most some 20 lines."""
        parts: list[RenderableType] = [self._title()]
        if self.steps:
            parts += [self._rewards(), _side_by_side(self._metrics(), self._phases())]
        parts += [
            Text(f"evaluation {evaluation_text(evaluation)}", style="cyan")
            for evaluation in self.evaluations
        ]
        if self.num_warnings > len(self.warnings):
            parts.append(Text(f"{self.num_warnings} warnings, the newest:", style="yellow"))
        parts += [
            Text(f"warning {one_line(warning.reason)}: {one_line(warning.message)}", style="yellow")
            for warning in self.warnings
        ]
        if self.connection:
            parts.append(Text(lost_text(self.connection), style="bold yellow"))
        return Group(*parts)

    def _title(self) -> Text:
        title = Text.assemble(
            (self.name, "bold"), "  ", (self.state, STATE_STYLES.get(self.state, "bold blue"))
        )
        if self.reason:
            title.append(f"  {one_line(self.reason)}")
        step = self.steps[-1].step if self.steps else 0
        title.append(f"  step {step}/{self.max_steps}")
        title.append(f"  {self.last_time - self.first_time:.0f} s")
        return title

    def _rewards(self) -> Text:
        rewards = [step.metrics.get("reward_mean", math.nan) for step in self.steps]
        return Text.assemble(
            ("reward ", "bold"),
            (sparkline(rewards), "green"),
            f"  {rewards[0]:.3f} … {rewards[-1]:.3f}",
        )

    def _metrics(self) -> Table:
        newest = self.steps[-1].metrics
        table = Table(box=None, show_header=False, pad_edge=False)
        for label, name, form in METRICS:
            if name in newest:
                table.add_row(Text(label, style="bold"), Text(f"{newest[name]:{form}}"))
        return table

    def _phases(self) -> Table:
        recent = self.steps[-RECENT_STEPS:]
        names = list(dict.fromkeys(name for step in recent for name in step.phases))
        seconds = {
            name: sum(step.phases.get(name, 0.0) for step in recent) / len(recent) for name in names
        }
        whole = seconds.pop("step", 0.0) or sum(seconds.get(name, 0.0) for name in IN_TURN) or 1.0
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_row(Text("step", style="bold"), f"{whole:.3f} s", Bar(1, 0, 1, width=BAR_WIDTH))
        in_turn = [name for name in IN_TURN if name in seconds]
        # The others (sampling and scoring one group) go on beside these and beside each other.
        for name in [*in_turn, *(name for name in seconds if name not in IN_TURN)]:
            beside = name not in IN_TURN
            table.add_row(
                Text(f"{name} (a group)" if beside else name, style="dim" if beside else ""),
                f"{seconds[name]:.3f} s",
                Bar(
                    1,
                    0,
                    min(seconds[name] / whole, 1.0),
                    width=BAR_WIDTH,
                    color="bright_black" if beside else "blue",
                ),
            )
        return table


def sparkline(values: Sequence[float]) -> str:
    """`values` as bars, the least at the bottom and the greatest at the top; NaN is a gap."""
    bars = "▁▂▃▄▅▆▇█"
    finite = [value for value in values if math.isfinite(value)]
    least, most = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(bars) - 1) / (most - least) if most > least else 0.0
    return "".join(
        bars[round((value - least) * scale)] if math.isfinite(value) else " " for value in values
    )


def lost_text(lost: ConnectionLost) -> str:
    """What to say about a lost connection."""
    return f"connection lost ({one_line(lost.problem)}); trying again in {lost.retry_s:g} s"


def _kept(
    evaluations: tuple[EvaluationCompleted, ...], newest: EvaluationCompleted
) -> tuple[EvaluationCompleted, ...]:
    """The first, which all others are compared with, and the newest."""
    everything = (*evaluations, newest)
    if len(everything) <= EVALUATIONS_SHOWN:
        return everything
    return (everything[0], *everything[-EVALUATIONS_SHOWN + 1 :])


def _side_by_side(left: RenderableType, right: RenderableType) -> Table:
    table = Table.grid(padding=(0, 4))
    table.add_row(left, right)
    return table
