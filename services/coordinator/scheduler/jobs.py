"""Which waiting jobs begin now, and what holds the others back.

In the order of class, then of the running jobs of their project over its weight, the fewest first,
then of creation. What waits for a quota of its project, or for a member that nobody has, holds up
no other; whoever waits for one of `max_running` places is counted as running for those behind it.
Running jobs of a project that has used up its day have none of these places: they draw nothing
before midnight, and from then on more than `max_running` may run until some have ended.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.coordinator.scheduler.usage import until_midnight

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from services.coordinator.scheduler.projects import Projects

Interval = tuple[float, float]
"""At the earliest and at the latest, in seconds from now."""


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """A job that has not begun. `order`: of creation.

    `retry_reason`: why it is tried again later; empty: nothing keeps it from being tried.
    `needs_adapter`: it has to make its own first. `needs_sampler`: something is drawn for it.
    """

    name: str
    project: str
    base_model: str
    priority: int
    order: int
    retry_reason: str = ""
    needs_adapter: bool = False
    needs_sampler: bool = True


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job that runs. `remaining_s`: None: nothing to go by."""

    name: str
    project: str
    base_model: str
    remaining_s: Interval | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a waiting job begins now; if not, as `types.Waiting` says it.

    `position`: from 1, among all that wait for the same thing. `eta_s`: None: nothing to go by.
    """

    job: WaitingJob
    start: bool
    rule: str = ""
    reason: str = ""
    release: str = ""
    position: int = 0
    eta_s: Interval | None = None


def admit(
    waiting: Iterable[WaitingJob],
    running: Collection[RunningJob],
    projects: Projects,
    *,
    max_running: int,
    trained: Collection[str],
    sampled: Collection[str],
    used_today: Callable[[str], int],
    now: float,
    num_adapters: Callable[[str], int] = lambda _: 0,
) -> list[Verdict]:
    """A verdict for each of `waiting`, in the order of their turns.

    `trained`, `sampled`: base models that a trainer and a sampler serve. `num_adapters`: that a
    project has. An ETA is that of the place which the job gets if the running ones end in the order
    of their remaining times: the position-th of the early ends, and of the late ones; a job of
    which nothing is known may end at once, or never. Behind more jobs than are known there is none.
    """
    admission = _Admission(list(running), projects, max_running, used_today, now, num_adapters)
    return [admission.verdict(job, trained, sampled) for job in _in_turn(waiting, admission)]


@dataclass(frozen=True, slots=True)
class _Ends:
    """When places of running jobs are free; `too_many` of them are nobody's.

    `num_unknown`: more jobs, of which nothing is known.
    """

    running: list[RunningJob]
    too_many: int
    num_unknown: int = 0

    def nth(self, position: int) -> Interval | None:
        """When the place of whoever is at `position` is."""
        known = [job.remaining_s for job in self.running if job.remaining_s]
        number = self.too_many + position
        if number > len(known):
            return None
        num_unknown = self.num_unknown + len(self.running) - len(known)
        lows = sorted([0.0] * num_unknown + [low for low, _ in known])
        return lows[number - 1], sorted(high for _, high in known)[number - 1]


@dataclass(slots=True)
class _Admission:
    running: list[RunningJob]
    projects: Projects
    max_running: int
    used_today: Callable[[str], int]
    now: float
    num_adapters: Callable[[str], int]
    num_started: int = 0
    # By project: adapters that those will make who start or wait for one of all places.
    new_adapters: Counter[str] = field(default_factory=Counter)
    # Running, without those that draw nothing before midnight: their places are lent to others.
    drawing: list[RunningJob] = field(default_factory=list)
    # By project: running, started, and waiting for one of all places.
    counts: Counter[str] = field(default_factory=Counter)
    # By what is waited for.
    lines: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.counts.update(job.project for job in self.running)
        self.drawing = [job for job in self.running if not self._day_used_up(job.project)]

    def verdict(
        self, job: WaitingJob, trained: Collection[str], sampled: Collection[str]
    ) -> Verdict:
        model = job.base_model
        if job.retry_reason:
            return self._waits(job, "RETRY", job.name, job.retry_reason, "the next attempt")
        if model not in trained:
            reason = f"no trainer of {model!r} serves"
            return self._waits(job, "NO_TRAINER", model, reason, f"a trainer of {model!r}")
        if job.needs_sampler and model not in sampled:
            reason = f"no sampler of {model!r} serves"
            return self._waits(job, "NO_SAMPLER", model, reason, f"a sampler of {model!r}")
        return self._over_quota(job) or self._in_place(job)

    def _over_quota(self, job: WaitingJob) -> Verdict | None:
        project = job.project
        policy = self.projects.of(project)
        if self._day_used_up(project):
            used, left_s = self.used_today(project), until_midnight(self.now)
            reason = f"{used} of {policy.tokens_per_day} tokens of today are used"
            release = f"midnight UTC, in {left_s / 3600:.1f} h"
            rule = "PROJECT_TOKENS_PER_DAY"
            return self._waits(job, rule, project, reason, release, eta_s=(left_s, left_s))
        if job.needs_adapter and policy.max_adapters is not None:
            num_adapters = self.num_adapters(project) + self.new_adapters[project]
            if num_adapters >= policy.max_adapters:
                reason = (
                    f"{num_adapters} of {policy.max_adapters} adapters of its project are there or "
                    "are made for jobs that go first"
                )
                release = "the deletion of an adapter of its project"
                return self._waits(job, "PROJECT_ADAPTERS", project, reason, release)
        allowed = policy.max_running_jobs
        if allowed is None or self.counts[project] < allowed:
            return None
        own = [running for running in self.running if running.project == project]
        return self._waits(
            job,
            "PROJECT_RUNNING_JOBS",
            project,
            f"{self.counts[project]} jobs of its project run or go first, and {allowed} may run",
            "the end of a job of its project",
            ends=_Ends(own, self.counts[project] - allowed),
        )

    def _day_used_up(self, project: str) -> bool:
        allowed = self.projects.of(project).tokens_per_day
        return allowed is not None and self.used_today(project) >= allowed

    def _in_place(self, job: WaitingJob) -> Verdict:
        self.counts[job.project] += 1
        self.new_adapters[job.project] += job.needs_adapter
        if len(self.drawing) + self.num_started < self.max_running:
            self.num_started += 1
            return Verdict(job, start=True)
        reason = f"{self.max_running} jobs run, which is the most"
        release = "the end of a job, and of those that go first"
        too_many = len(self.drawing) + self.num_started - self.max_running
        ends = _Ends(self.drawing, too_many, self.num_started)
        return self._waits(job, "MAX_RUNNING_JOBS", "", reason, release, ends=ends)

    def _waits(
        self,
        job: WaitingJob,
        rule: str,
        what: str,
        reason: str,
        release: str,
        *,
        ends: _Ends | None = None,
        eta_s: Interval | None = None,
    ) -> Verdict:
        self.lines[rule, what] += 1
        position = self.lines[rule, what]
        if ends is not None:
            eta_s = ends.nth(position)
        return Verdict(
            job,
            start=False,
            rule=rule,
            reason=reason,
            release=release,
            position=position,
            eta_s=eta_s,
        )


def _in_turn(waiting: Iterable[WaitingJob], admission: _Admission) -> Iterator[WaitingJob]:
    """The order of the turns, while the caller counts who gets one."""
    classes: defaultdict[int, defaultdict[str, list[WaitingJob]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for job in sorted(waiting, key=lambda job: job.order, reverse=True):
        classes[job.priority][job.project].append(job)

    def turn(project: str, jobs: list[WaitingJob]) -> tuple[float, int, str]:
        weight = admission.projects.of(project).weight
        return admission.counts[project] / weight, jobs[-1].order, project

    for _, by_project in sorted(classes.items(), reverse=True):
        turns = [turn(project, jobs) for project, jobs in by_project.items()]
        heapq.heapify(turns)
        while turns:
            _, _, project = turns[0]
            jobs = by_project[project]
            yield jobs.pop()
            if jobs:
                heapq.heapreplace(turns, turn(project, jobs))
            else:
                heapq.heappop(turns)
