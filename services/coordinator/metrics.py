"""What a training step tells: its metrics and what its phases cost, as job.proto lists them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import numpy as np

from rollmesh import telemetry
from services.coordinator.batch import equal_rewards

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from services.coordinator.rollouts import Group


class Phases:
    """Seconds by phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block as phase `name`."""
        start = asyncio.get_running_loop().time()
        yield
        self.add(name, asyncio.get_running_loop().time() - start)

    def add(self, name: str, seconds: float) -> None:
        """Phase `name` took so many seconds, more."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        telemetry.record("rollmesh.job.phase", seconds, phase=name)


def of_trainer(*ops: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a step's training ops; the seconds that each of them tells are added up."""
    told: dict[str, float] = {}
    for metrics in ops:
        for name, value in metrics.items():
            told[name] = told.get(name, 0.0) + value if name.endswith("_s") else value
    return told


def of_groups(groups: Sequence[Group], *, step: int, step_s: float) -> dict[str, float]:
    """The metrics of the groups that step `step`, which took `step_s`, was trained on.

    reward_std is the population's, over all rollouts.
    """
    rewards = np.array([reward for group in groups for reward in group.rewards])
    completions = [completion for group in groups for completion in group.drawn.completions]
    lengths = np.array([len(completion.token_ids) for completion in completions])
    staleness = np.array([step - group.policy_version for group in groups])
    truncated = [completion.stop_reason == "length" for completion in completions]
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "staleness_mean": float(staleness.mean()),
        "staleness_max": float(staleness.max()),
        "completion_tokens_mean": float(lengths.mean()),
        "num_tokens": float(lengths.sum()),
        "num_rollouts": float(len(completions)),
        "tokens_per_s": float(lengths.sum() / step_s) if step_s else 0.0,
        "groups_with_equal_rewards": float(sum(map(equal_rewards, groups))),
        "truncated_fraction": float(np.mean(truncated)),
    }
