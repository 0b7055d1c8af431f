"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rollmesh.job import LearningRateSpec


def learning_rate(spec: LearningRateSpec, step: int, *, max_steps: int) -> float:
    """The rate of the optimizer step that follows `step` finished ones, in [0, max_steps).

    Warm-up rises in equal parts, so that not even the first step is lost on a rate of 0, and the
    step after it has the peak. From there the rate falls to `final`, which the last step has.
    """
    if step < spec.warmup_steps:
        return spec.peak * (step + 1) / (spec.warmup_steps + 1)
    falling = max_steps - 1 - spec.warmup_steps
    if spec.schedule == "constant" or falling <= 0:
        return spec.peak
    fallen = (step - spec.warmup_steps) / falling
    if spec.schedule == "cosine":
        fallen = (1 - math.cos(math.pi * fallen)) / 2
    return spec.peak + (spec.final - spec.peak) * fallen
