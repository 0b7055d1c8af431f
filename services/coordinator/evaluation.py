"""Greedy evaluation of one version of the policy on held-out tasks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from rollmesh import telemetry
from rollmesh.errors import EnvironmentFailed
from rollmesh.job import EvaluationCompleted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rollmesh import types
    from rollmesh.job import JobSpec
    from services.coordinator.datasets import Task
    from services.coordinator.ports import RolloutMaker


async def evaluate(
    tasks: Sequence[Task],
    source: types.AdapterSource,
    maker: RolloutMaker,
    *,
    step: int,
    name: str = "",
) -> EvaluationCompleted:
    """The mean reward of one greedy rollout of each task of set `name`, which `source` draws.

    Tasks that the environment failed at count for nothing.

    Raises:
        EnvironmentFailed: it failed at all of them.
        MeshError: as `maker` says.
    """
    clock = asyncio.get_running_loop().time
    start = clock()
    with telemetry.span("job.evaluate", step=step, set=name, policy_version=source.policy_version):
        found = await maker.evaluated(tasks, source)
    rewards = [reward for reward in found if reward is not None]
    if not rewards:
        raise EnvironmentFailed(f"the environment failed at each of {len(tasks)} tasks")
    return EvaluationCompleted(
        step=step,
        reward_mean=sum(rewards) / len(rewards),
        num_tasks=len(rewards),
        duration_s=clock() - start,
        set=name,
    )


def is_due(spec: JobSpec, step: int) -> bool:
    """Whether to evaluate after `step` optimizer steps: first, every few, and last."""
    if spec.evaluation is None:
        return False
    every = spec.evaluation.every_steps
    return step in {0, spec.stop.max_steps} or (every is not None and step % every == 0)


def is_better(
    evaluation: EvaluationCompleted, best: EvaluationCompleted | None, min_improvement: float
) -> bool:
    """Whether an evaluation is the best so far, and by enough."""
    return best is None or evaluation.reward_mean > best.reward_mean + min_improvement
