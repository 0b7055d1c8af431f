"""One simulation from its parameters: a mix of jobs under a policy on a fleet."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.coordinator.simulation.metrics import figures
from services.coordinator.simulation.mixes import EQUAL, MIXES
from services.coordinator.simulation.policies import setting
from services.coordinator.simulation.world import World

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.coordinator.simulation.calibration import Calibration
    from services.coordinator.simulation.jobs import JobModel
    from services.coordinator.simulation.metrics import Figures
    from services.coordinator.simulation.trace import Trace


@dataclass(frozen=True, slots=True)
class Result:
    """`wall_s`: how long it took to simulate."""

    trace: Trace
    figures: Figures
    num_trainers: int
    wall_s: float


def simulate(
    mix: str,
    policy: str,
    *,
    num_jobs: int,
    num_samplers: int,
    num_trainers: int | None,
    calibration: Calibration,
    seed: int,
) -> Result:
    """`num_trainers` None: as the work is spread; see `trainers_for`.

    Where machines do both, there are as many as samplers and trainers together.
    """
    jobs = MIXES[mix](num_jobs)
    if num_trainers is None:
        num_trainers = trainers_for(jobs, num_samplers, calibration)
    bound = calibration.max_running_completions
    chosen = setting(
        policy, bound=bound, num_jobs=num_jobs, num_samplers=num_samplers, projects=EQUAL
    )
    machines = num_samplers + num_trainers
    start = time.perf_counter()
    world = World(
        jobs,
        num_samplers=machines if chosen.colocated else num_samplers,
        num_trainers=1 if chosen.colocated else num_trainers,
        calibration=calibration,
        new_policy=chosen.new,
        projects=EQUAL,
        max_running_jobs=chosen.max_running_jobs,
        seed=seed,
        trainer_speed=machines if chosen.colocated else 1,
    )
    trace = world.run()
    wall_s = time.perf_counter() - start
    of_trace = figures(
        trace,
        EQUAL,
        {job.name: job.project for job in jobs},
        slots=bound,
        colocated=chosen.colocated,
    )
    return Result(trace, of_trace, num_trainers, wall_s)


def trainers_for(jobs: Iterable[JobModel], num_samplers: int, calibration: Calibration) -> int:
    """As many for each sampler as the jobs have work for them, to the nearest whole machine."""
    sample_s, train_s = work(jobs, calibration)
    return max(1, round(num_samplers * train_s / sample_s))


def work(jobs: Iterable[JobModel], calibration: Calibration) -> tuple[float, float]:
    """Seconds that one full sampler, and that one trainer, would be busy with all of it."""
    bound = calibration.max_running_completions
    rate = calibration.rates()[bound] * bound
    sample_s = train_s = 0.0
    for job in jobs:
        groups = job.steps * job.groups_per_step
        completions = groups * job.group_size
        drawn = completions * job.lengths.typical
        prompts = job.prompt_tokens * calibration.prefill_s_per_token
        sample_s += drawn / rate + groups * prompts
        tokens = drawn + completions * job.prompt_tokens
        train_s += tokens * calibration.train_s_per_token + job.steps * calibration.train_step_s
    return sample_s, train_s
