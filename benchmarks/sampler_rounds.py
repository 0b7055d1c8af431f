"""Ways that take turns, and how their figures are told."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Speeds = dict[str, list[float]]
"""Of each way the tokens/s of each round."""


def take_turns(ways: Mapping[str, Callable[[], float]], rounds: int) -> Speeds:
    """Each way once untimed (the first batches are slow), then in turns."""
    for run in ways.values():
        run()
    speeds: Speeds = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            speeds[way].append(run())
    return speeds


def ratio(speeds: Speeds, way: str, to: str) -> float:
    """The median over the rounds of one way's speed over the other's in the same round."""
    pairs = zip(speeds[way], speeds[to], strict=True)
    return round(statistics.median(one / other for one, other in pairs), 3)


def show(title: str, speeds: Speeds) -> None:
    """A table with the noise: (fastest − slowest) / median."""
    print(f"\n{title:44}{'tokens/s':>10}{'slowest':>10}{'fastest':>10}{'spread':>8}")  # noqa: T201
    for way, found in speeds.items():
        median = statistics.median(found)
        spread = (max(found) - min(found)) / median
        columns = f"{median:10.0f}{min(found):10.0f}{max(found):10.0f}{spread:8.2f}"
        print(f"{way:44}{columns}")  # noqa: T201
