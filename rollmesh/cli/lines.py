"""An event as one line of text: what `watch` prints where nobody can look at a live view."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rollmesh.cli.output import one_line
from rollmesh.job import EvaluationCompleted, StateChanged, StepCompleted, Warned

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rollmesh.job import JobEvent

METRICS = (
    ("reward", "reward_mean", ".3f"),
    ("loss", "loss", ".4g"),
    ("kl", "kl_sampler", ".2e"),
    ("kl to base", "kl_base", ".2e"),
    ("kl to teacher", "kl_teacher", ".3g"),
    ("staleness", "staleness_mean", ".2g"),
    ("tokens/s", "tokens_per_s", ",.0f"),
)
"""What is shown of a step: label, metric's name, format. Absent metrics are left out."""

IN_TURN = ("wait", "agreement", "forward_backward", "optim_step", "publish", "load")
"""Phases that follow each other and together are nearly the whole step."""


def event_line(event: JobEvent, max_steps: int) -> str:
    """`event` for a person to read; `max_steps` is the job's."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    return f"{clock} {_happening(event, max_steps)}"


def _happening(event: JobEvent, max_steps: int) -> str:
    match event.event:
        case StateChanged(from_state=before, to_state=after, reason=reason):
            change = f"{before} -> {after}" if before else after
            return f"state {change}" + (f": {one_line(reason)}" if reason else "")
        case StepCompleted(step=step, metrics=metrics, phases=phases):
            return f"step {step}/{max_steps}  {_metrics(metrics)}  {_phases(phases)}"
        case EvaluationCompleted() as evaluation:
            return f"evaluation {evaluation_text(evaluation)}"
        case Warned(reason=reason, message=message):
            return f"warning {one_line(reason)}: {one_line(message)}"


def evaluation_text(evaluation: EvaluationCompleted) -> str:
    """An evaluation in a few words."""
    return (
        f"after step {evaluation.step}: reward {evaluation.reward_mean:.3f} "
        f"({evaluation.num_tasks} tasks, {evaluation.duration_s:.1f} s)"
    )


def _metrics(metrics: Mapping[str, float]) -> str:
    return "  ".join(
        f"{label} {metrics[name]:{form}}" for label, name, form in METRICS if name in metrics
    )


def _phases(phases: Mapping[str, float]) -> str:
    """The wall time, and in brackets what it went into."""
    parts = ", ".join(f"{name} {phases[name]:.2f}" for name in IN_TURN if name in phases)
    return f"{phases.get('step', 0.0):.2f} s ({parts})"
