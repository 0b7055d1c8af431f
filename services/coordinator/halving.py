"""Successive halving: at which steps jobs are compared, and which of them go on.

The rule is that of Jamieson and Talwalkar, "Non-stochastic best arm identification and
hyperparameter optimization", AISTATS 2016 (https://arxiv.org/abs/1502.07943), with the rungs of
Li et al., "Hyperband", JMLR 2018: rung k is at step first_step × factor^k, and of the n jobs that
have come to it the best ⌈n / factor⌉ go on. Pure: the store asks, and does what comes of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollmesh.job import FINAL_STATES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rollmesh.sweep import HalvingSpec
    from services.coordinator.lifecycle import Phase


@dataclass(frozen=True, slots=True)
class Contestant:
    """A job of a sweep: its number there, where it is, and what it is compared by, if anything."""

    number: int
    phase: Phase
    rung: int
    metric: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the job of that number goes on, and the rule and the figures that say so."""

    number: int
    goes_on: bool
    reason: str


def rung_step(halving: HalvingSpec, rung: int) -> int:
    """The step at which jobs that have survived `rung` comparisons are compared next."""
    return halving.first_step * int(halving.factor**rung)


def compare(halving: HalvingSpec, jobs: Sequence[Contestant]) -> list[Verdict]:
    """What becomes of the jobs that are left, best first; nothing while some of them are under way.

    A job that has ended, however it did, is out. Of equal figures that of the lower number is the
    better one, and any is better than none. Where nobody has a figure, all go on.
    """
    left = [job for job in jobs if job.phase not in FINAL_STATES]
    if not left or any(job.phase != "HELD" for job in left):
        return []
    # They went on together from the comparison before, so all stand at the same rung.
    (rung,) = {job.rung for job in left}
    if all(job.metric is None for job in left):
        reason = (
            f"successive halving at step {rung_step(halving, rung)}: none of {len(left)} has a "
            f"figure for {halving.metric}, all go on"
        )
        return [Verdict(job.number, goes_on=True, reason=reason) for job in left]
    ranked = sorted(left, key=lambda job: (job.metric is None, -(job.metric or 0.0), job.number))
    places = math.ceil(len(ranked) / halving.factor)
    return [
        Verdict(
            job.number,
            goes_on=place <= places,
            reason=f"successive halving at step {rung_step(halving, rung)}: "
            f"{_figure(halving, job.metric)} is {ordinal(place)} of {len(ranked)}, "
            + ("the best 1 goes on" if places == 1 else f"the best {places} go on"),
        )
        for place, job in enumerate(ranked, start=1)
    ]


def _figure(halving: HalvingSpec, metric: float | None) -> str:
    return f"no {halving.metric}" if metric is None else f"{halving.metric} {metric:.4g}"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, …, 11th, …, 21st."""
    last = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if 11 <= number % 100 <= 13 else last}"
