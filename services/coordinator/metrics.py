"""What a training step tells: its metrics and what its phases cost, as job.proto lists them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from rollmesh import telemetry
from services.coordinator.batch import equal_rewards

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rollmesh.job import JobSpec
    from services.coordinator.groups import Group, Rollout


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


def of_groups(groups: Sequence[Group], spec: JobSpec, *, step: int) -> dict[str, float]:
    """The metrics of the groups that step `step` was trained on.

    reward_std is the population's, over all rollouts. Without a reward, and of completions that
    were not sampled, there is less to tell.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = np.array([rollout.num_drawn for rollout in rollouts])
    staleness = np.array([step - group.policy_version for group in groups])
    metrics = {
        "staleness_mean": float(staleness.mean()),
        "staleness_max": float(staleness.max()),
        "completion_tokens_mean": float(lengths.mean()),
        "num_tokens": float(lengths.sum()),
        "num_rollouts": float(len(rollouts)),
    }
    if spec.sft is not None:
        return metrics
    metrics["truncated_fraction"] = float(np.mean([rollout.truncated for rollout in rollouts]))
    if spec.environment is not None:
        metrics["turns_mean"] = float(np.mean([len(rollout.turns) for rollout in rollouts]))
    if spec.is_rewarded:
        rewards = np.array([rollout.reward for rollout in rollouts])
        metrics["reward_mean"] = float(rewards.mean())
        metrics["reward_std"] = float(rewards.std())
        metrics["groups_with_equal_rewards"] = float(sum(map(equal_rewards, groups)))
        metrics |= _named_rewards(rollouts)
    return metrics


def _named_rewards(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The mean of each part that rewards are made up of, over the rollouts that have it."""
    found: dict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        for name, reward in rollout.rewards.items():
            found[name].append(reward)
    return {f"reward.{name}": float(np.mean(parts)) for name, parts in sorted(found.items())}


def emit(metrics: Mapping[str, float]) -> None:
    """Tell the metrics of a step to whoever collects telemetry; its span is the current one."""
    telemetry.annotate("metric", metrics)
    for name, emitted in _EMITTED.items():
        if name in metrics:
            telemetry.record(emitted, metrics[name])


_EMITTED = {
    "reward_mean": "rollmesh.job.reward",
    "loss": "rollmesh.job.loss",
    "kl_sampler": "rollmesh.job.kl",
    "staleness_max": "rollmesh.job.staleness",
    "tokens_per_s": "rollmesh.job.tokens_per_s",
    "logprob_gap_max": "rollmesh.job.logprob_gap",
}
