"""Greedy evaluation of one version of the policy on held-out tasks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from rollmesh import telemetry, types
from rollmesh.job import EvaluationCompleted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rollmesh.job import JobSpec
    from services.coordinator.datasets import Task
    from services.coordinator.rollouts import Drawn, Rollouts

MAX_CONCURRENT = 256
"""Requests of one evaluation at once: enough to fill a sampler, few enough to leave its queue."""
SCORE_BATCH = 512


async def evaluate(
    spec: JobSpec,
    tasks: Sequence[Task],
    source: types.AdapterSource,
    rollouts: Rollouts,
    *,
    step: int,
    name: str = "",
) -> EvaluationCompleted:
    """The mean reward of one greedy completion of each task of set `name`, which `source` draws.

    Errors are those of Rollouts.draw and Rollouts.score.
    """
    clock = asyncio.get_running_loop().time
    start = clock()
    params = types.SamplingParams(
        max_tokens=spec.sampling.max_tokens, temperature=0.0, stop=tuple(spec.sampling.stop)
    )
    drawn: dict[int, Drawn] = {}

    async def work(pending: Iterator[tuple[int, Task]]) -> None:
        for index, task in pending:
            drawn[index] = await rollouts.draw(task, source, 1, params)

    with telemetry.span("job.evaluate", step=step, set=name, policy_version=source.policy_version):
        pending = iter(enumerate(tasks))
        async with asyncio.TaskGroup() as workers:
            for _ in range(min(MAX_CONCURRENT, len(tasks))):
                workers.create_task(work(pending))
        in_order = [drawn[index] for index in range(len(tasks))]
        rewards: list[float] = []
        for first in range(0, len(tasks), SCORE_BATCH):
            rewards += await rollouts.score(in_order[first : first + SCORE_BATCH])
    return EvaluationCompleted(
        step=step,
        reward_mean=sum(rewards) / len(rewards),
        num_tasks=len(tasks),
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
