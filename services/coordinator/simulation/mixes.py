"""Sets of jobs that share a fleet. What a mix is for says its name; none was fitted to a result."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from services.coordinator.scheduler import ProjectPolicy, Projects
from services.coordinator.simulation.jobs import JobModel, Lengths

if TYPE_CHECKING:
    from collections.abc import Callable

SHORT = Lengths("uniform", 64, 192, 256)
"""Answers."""
MEDIUM = Lengths("lognormal", 256, 1024, 1024)
"""Chains of thought: the longest are four times the median."""
LONG = Lengths("lognormal", 512, 4096, 4096)
"""Long thoughts: the longest are eight times the median, and most of a step is waiting for them."""

_JOB = JobModel("", "p0", 8, 8, 8, 128, MEDIUM, reward_s=1.0)


def uniform(num_jobs: int) -> list[JobModel]:
    """All the same, of one project each."""
    return [_named(_JOB, number) for number in range(num_jobs)]


def heavy_tails(num_jobs: int) -> list[JobModel]:
    """The same with long completions, few of which are very long."""
    return [_named(replace(_JOB, lengths=LONG), number) for number in range(num_jobs)]


def slow_rewards(num_jobs: int) -> list[JobModel]:
    """The same with rewards that take half a minute: tests in a sandbox, a judge."""
    return [_named(replace(_JOB, reward_s=30.0), number) for number in range(num_jobs)]


def greedy(num_jobs: int) -> list[JobModel]:
    """One project has half of the jobs, each with four times the groups; the others one each."""
    half = num_jobs // 2
    return [
        replace(_JOB, name=f"j{number}", project="greedy", groups_per_step=32)
        if number < half
        else _named(_JOB, number)
        for number in range(num_jobs)
    ]


def bursts(num_jobs: int) -> list[JobModel]:
    """They come four at a time, two minutes apart."""
    return [
        replace(_named(_JOB, number), submitted_s=120.0 * (number // 4))
        for number in range(num_jobs)
    ]


def mixed(num_jobs: int) -> list[JobModel]:
    """Answers, thoughts and long thoughts; quick checks, sandboxes and judges; small and large."""
    kinds = [
        replace(_JOB, lengths=SHORT, groups_per_step=16, steps=16, reward_s=0.1),
        replace(_JOB, lengths=MEDIUM, reward_s=1.0),
        replace(_JOB, lengths=LONG, groups_per_step=4, steps=6, reward_s=1.0),
        replace(_JOB, lengths=MEDIUM, groups_per_step=4, steps=12, reward_s=10.0),
        replace(_JOB, lengths=SHORT, groups_per_step=32, steps=12, group_size=4, reward_s=3.0),
        replace(_JOB, lengths=MEDIUM, groups_per_step=16, steps=6, reward_s=30.0),
        replace(_JOB, lengths=LONG, groups_per_step=8, steps=4, reward_s=5.0),
        replace(_JOB, lengths=MEDIUM, groups_per_step=8, steps=8, group_size=16, reward_s=0.1),
    ]
    return [_named(kinds[number % len(kinds)], number) for number in range(num_jobs)]


def _named(job: JobModel, number: int) -> JobModel:
    return replace(job, name=f"j{number}", project=f"p{number}")


MIXES: dict[str, Callable[[int], list[JobModel]]] = {
    "mixed": mixed,
    "uniform": uniform,
    "heavy_tails": heavy_tails,
    "slow_rewards": slow_rewards,
    "greedy": greedy,
    "bursts": bursts,
}

EQUAL = Projects(ProjectPolicy(max_priority=1))
"""Every project with weight 1 and no quota."""
