"""What the scheduler takes, and what it makes of a fleet: `python -m benchmarks.scheduler`.

The first part drives the real scheduler alone, the second simulates whole fleets with it and with
what it is compared with (services/coordinator/simulation). Service times of the second are those of
benchmarks/calibration/gpu.json; the mixes are in services/coordinator/simulation/mixes.py.

`decisions_per_s`: one decision is all that a request costs: submit, assign, progress, finish.
`jain`: of the tokens over the weights of the projects in the first part, which all wait all the
time. The others are of 8 mixed on-policy jobs under the real scheduler, means over the seeds:

- `utilization_on_policy`: of the whole fleet, until the first job ends: the share of time in which
  a sampler draws anything or a trainer computes a pass, each machine counting the same.
  `utilization_makespan`: the same until the last job ends; `utilization_samplers`: of samplers
  alone, until the first ends.
- `experiments_vs_one_at_a_time`: jobs per GPU-hour, against those of the same jobs one after the
  other on the same fleet. `experiments_best_vs_best`: each on that of SIZES that suits it best.
- `experiments_vs_colocated`, `experiments_best_vs_best_colocated`: the same against one job after
  the other with sampling and training taking turns on all machines.

The fleet is sized from the jobs' mean work and not from results: of those with at most one machine
for each job, the one whose trainers for each sampler are nearest to the trainer-seconds that the
mix needs for each second of a full sampler; of equals the largest.
"""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from random import Random
from statistics import mean

from services.coordinator.scheduler import ProjectPolicy, Projects, Request, SamplerState, Scheduler
from services.coordinator.simulation.calibration import Calibration
from services.coordinator.simulation.metrics import jain
from services.coordinator.simulation.mixes import MIXES
from services.coordinator.simulation.policies import POLICIES
from services.coordinator.simulation.running import Result, simulate, work

QUEUED, PROJECTS, SAMPLERS = 1000, 100, 32
DECISIONS = 60_000
SEEDS = range(3)
JOBS = 8
SIZES = ((1, 1), (2, 1), (2, 2), (3, 2), (4, 2), (4, 3), (5, 3), (8, 6))
"""Samplers and trainers."""
CALIBRATION = Path(__file__).parent / "calibration" / "gpu.json"


def decisions() -> dict[str, float]:
    """The real scheduler with QUEUED requests waiting all the time."""
    weights = {f"p{number}": (1.0, 2.0, 4.0)[number % 3] for number in range(PROJECTS)}
    projects = Projects(
        by_id={project: ProjectPolicy(weight=weight) for project, weight in weights.items()}
    )
    scheduler = Scheduler(
        max_running_completions=256,
        max_queued_requests=QUEUED,
        projects=projects,
        prompt_token_price=0.25,
    )
    samplers = [SamplerState(f"s{number}", "base", ()) for number in range(SAMPLERS)]
    random = Random(0)  # noqa: S311
    served = dict.fromkeys(weights, 0.0)
    running: deque[Request] = deque()
    count = 0

    def submit(project: str, now: float) -> None:
        nonlocal count
        count += 1
        policy = (f"{project}/a", 1)
        scheduler.submit(Request(count, project, "base", policy, 100, 8, 256, job=project), now)

    def assign(now: float) -> None:
        for assignment in scheduler.assign(samplers, now):
            running.append(assignment.request)
            # Who was served asks again at once.
            submit(assignment.request.project, now)

    for number in range(QUEUED):
        submit(f"p{number % PROJECTS}", 0.0)
    assign(0.0)
    cpu, wall = time.process_time(), time.perf_counter()
    for number in range(DECISIONS):
        request = running.popleft()
        tokens = 8 * random.randint(64, 192)
        scheduler.progress(request.id, num_tokens=tokens, num_finished=8)
        scheduler.finish(request.id, completed=True, now=float(number))
        served[request.project] += tokens
        assign(float(number))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    shares = [served[project] / weight for project, weight in weights.items()]
    print(  # noqa: T201
        f"{DECISIONS} requests of {PROJECTS} projects, {QUEUED} waiting, {SAMPLERS} samplers: "
        f"{DECISIONS / cpu:,.0f} decisions per second of processor, {DECISIONS / wall:,.0f} of "
        f"the clock; Jain index {jain(shares):.4f}"
    )
    return {
        "decisions_per_s": round(DECISIONS / cpu),
        "decisions_per_wall_s": round(DECISIONS / wall),
        "jain": round(jain(shares), 4),
    }


def fleets() -> dict[str, float]:
    """Every mix under every policy, and fleets of other sizes."""
    calibration = Calibration.load(CALIBRATION)

    def runs(mix: str, policy: str, samplers: int, trainers: int) -> list[Result]:
        return [
            simulate(
                mix,
                policy,
                num_jobs=JOBS,
                num_samplers=samplers,
                num_trainers=trainers,
                calibration=calibration,
                seed=seed,
            )
            for seed in SEEDS
        ]

    header = (
        f"{'':16}{'jobs/GPU-h':>11}{'vs one':>8}{'samplers':>10}{'loaded':>8}{'slots':>7}"
        f"{'trainers':>9}{'fleet':>7}{'p50 s':>7}{'p95 s':>7}{'Jain':>7}"
    )
    found: dict[str, list[Result]] = {}
    for mix in MIXES:
        samplers, trainers = sized(mix, calibration)
        results = {policy: runs(mix, policy, samplers, trainers) for policy in POLICIES}
        found = found or results
        alone = _rate(results["one_at_a_time"])
        print(f"\n{mix}: {JOBS} jobs, {samplers} samplers, {trainers} trainers\n{header}")  # noqa: T201
        for policy, of_policy in results.items():
            print(_row(policy, of_policy, alone))  # noqa: T201
    alone = _rate(found["one_at_a_time"])
    best = {}
    print(f"\nmixed, other fleets (samplers+trainers)\n{header}")  # noqa: T201
    for policy in ("rollmesh", "one_at_a_time", "colocated"):
        # Who does both on every machine can do with one.
        sizes = ((1, 0), *SIZES) if policy == "colocated" else SIZES
        of_sizes = {size: runs("mixed", policy, *size) for size in sizes}
        best[policy] = max(map(_rate, of_sizes.values()))
        for (samplers, trainers), of_size in of_sizes.items():
            name = f"{policy.replace('_at_a_time', '')} {samplers}+{trainers}"
            print(_row(name, of_size, alone))  # noqa: T201
    product = found["rollmesh"]
    together = _rate(found["colocated"])
    return {
        "utilization_on_policy": round(mean(r.figures.fleet_busy_loaded for r in product), 3),
        "utilization_makespan": round(mean(r.figures.fleet_busy for r in product), 3),
        "utilization_samplers": round(mean(r.figures.sampler_busy_loaded for r in product), 3),
        "experiments_vs_one_at_a_time": round(_rate(product) / alone, 2),
        "experiments_best_vs_best": round(best["rollmesh"] / best["one_at_a_time"], 2),
        "experiments_vs_colocated": round(_rate(product) / together, 2),
        "experiments_best_vs_best_colocated": round(best["rollmesh"] / best["colocated"], 2),
    }


def sized(mix: str, calibration: Calibration) -> tuple[int, int]:
    """Samplers and trainers for its jobs, by their mean work; see above."""
    sample_s, train_s = work(MIXES[mix](JOBS), calibration)
    fleets = [
        (samplers, trainers)
        for samplers in range(1, JOBS)
        for trainers in range(1, JOBS - samplers + 1)
    ]

    def off(fleet: tuple[int, int]) -> tuple[float, int]:
        return abs(fleet[1] / fleet[0] - train_s / sample_s), -sum(fleet)

    return min(fleets, key=off)


def _rate(results: list[Result]) -> float:
    return mean(result.figures.experiments_per_gpu_hour for result in results)


def _row(name: str, results: list[Result], alone: float) -> str:
    def of(field: str) -> float:
        return mean(getattr(result.figures, field) for result in results)

    rate = _rate(results)
    return (
        f"{name:16}{rate:11.2f}{rate / alone:8.2f}{of('sampler_busy'):10.1%}"
        f"{of('sampler_busy_loaded'):8.1%}{of('sampler_slots_loaded'):7.1%}"
        f"{of('trainer_busy_loaded'):9.1%}{of('fleet_busy_loaded'):7.1%}"
        f"{of('step_s_p50'):7.1f}{of('step_s_p95'):7.1f}{of('jain'):7.3f}"
    )


if __name__ == "__main__":
    print(json.dumps({**decisions(), **fleets()}))  # noqa: T201
