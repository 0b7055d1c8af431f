"""The figures of a simulation, from its trace alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import mean, quantiles
from typing import TYPE_CHECKING

from services.coordinator.simulation.trace import Begun, Drawn, Marked, Trained

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from services.coordinator.scheduler import Projects
    from services.coordinator.simulation.trace import Trace


@dataclass(frozen=True, slots=True)
class Figures:
    """What one simulation came to.

    `makespan_s`: from the first submission to the end of the last job. `loaded_s`: until the first
    job ends. Shares are of the time of all machines of a kind, until `makespan_s`, or `loaded_s`
    where they are called loaded. `sampler_busy`: anything is drawn, however little (by time).
    `sampler_slots`: completions under way over those that fit (by slot): never more than the share
    by time. `trainer_busy`: a pass is computed. `fleet_busy`: samplers by time and trainers, each
    machine counting the same. `experiments_per_gpu_hour`: jobs done over machines × makespan.
    `step_s`: from the moment a job could begin a step till its policy is trained. `jain`: of the
    projects' tokens over their weights while loaded; who asked for less than its share lowers it.
    """

    makespan_s: float
    loaded_s: float
    sampler_busy: float
    sampler_busy_loaded: float
    sampler_slots_loaded: float
    trainer_busy: float
    trainer_busy_loaded: float
    fleet_busy: float
    fleet_busy_loaded: float
    experiments_per_gpu_hour: float
    step_s_p50: float
    step_s_p95: float
    staleness_mean: float
    staleness_max: int
    jain: float
    num_decisions: int


def figures(
    trace: Trace,
    projects: Projects,
    project_of: Mapping[str, str],
    *,
    slots: int,
    colocated: bool = False,
) -> Figures:
    """What a trace comes to. `project_of`: by job.

    `slots`: completions that fit on a sampler. `colocated`: all samplers are the one trainer.
    """
    ends = [one.time for one in trace.happened if isinstance(one, Marked) and one.what == "ended"]
    steps = [seconds for of_job in trace.steps.values() for seconds in of_job]
    trained = [one for one in trace.happened if isinstance(one, Trained)]
    staleness = [one.step - version for one in trained for _, version in one.groups]
    loaded_s = min(ends)
    num_samplers = len(trace.samplers)
    num_trainers = num_samplers if colocated else len(trace.trainers)
    machines = num_samplers if colocated else num_samplers + num_trainers

    def shares(until: float) -> tuple[float, float, float, float]:
        drawing = mean(_drawing(history, until, 1) for history in trace.samplers.values())
        slotted = mean(_drawing(history, until, slots) for history in trace.samplers.values())
        training = mean(_busy(passes, until) for passes in trace.trainers)
        fleet = (num_samplers * drawing + num_trainers * training) / machines
        return drawing / until, slotted / until, training / until, fleet / until

    whole, loaded = shares(trace.end), shares(loaded_s)
    p50, p95 = (quantiles(steps, n=20)[index] for index in (9, 18)) if len(steps) > 1 else (0, 0)
    return Figures(
        makespan_s=trace.end,
        loaded_s=loaded_s,
        sampler_busy=whole[0],
        sampler_busy_loaded=loaded[0],
        sampler_slots_loaded=loaded[1],
        trainer_busy=whole[2],
        trainer_busy_loaded=loaded[2],
        fleet_busy=whole[3],
        fleet_busy_loaded=loaded[3],
        experiments_per_gpu_hour=len(ends) / (machines * trace.end / 3600),
        step_s_p50=p50,
        step_s_p95=p95,
        staleness_mean=mean(staleness),
        staleness_max=max(staleness),
        jain=jain(weighted_tokens(trace, projects, project_of, loaded_s)),
        num_decisions=sum(isinstance(one, Begun) for one in trace.happened),
    )


def jain(shares: Iterable[float]) -> float:
    """1: all the same; 1 / n: one of n has all (Jain, Chiu and Hawe 1984)."""
    values = list(shares)
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def weighted_tokens(
    trace: Trace, projects: Projects, project_of: Mapping[str, str], until: float
) -> list[float]:
    """Of each project that had a job by then; one that was given nothing counts, with 0."""
    tokens: defaultdict[str, int] = defaultdict(int)
    for one in trace.happened:
        if one.time > until:
            continue
        if isinstance(one, Drawn):
            tokens[one.request.project] += one.num_tokens
        elif isinstance(one, Marked) and one.what == "submitted":
            tokens[project_of[one.subject]] += 0
    return [count / projects.of(project).weight for project, count in tokens.items()]


def _drawing(history: Sequence[tuple[float, int]], until: float, slots: int) -> float:
    """Seconds in which all of `slots` are used, or as much of it as are."""
    total = 0.0
    for (begin, count), (end, _) in zip(history, [*history[1:], (until, 0)], strict=True):
        total += max(0.0, min(end, until) - begin) * min(1.0, count / slots)
    return total


def _busy(passes: Iterable[tuple[float, float]], until: float) -> float:
    return sum(max(0.0, min(end, until) - begin) for begin, end in passes)
