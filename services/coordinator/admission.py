"""Which jobs may run, and where those that wait stand: the scheduler's verdicts on the queue.

How long a running job goes on is told from the steps that it took since this process began to run
it: the time of one of them times those that are left, give or take SPREAD, as an evaluation and the
length of completions are not known; at the earliest it may be stopped any moment by its user.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.job import QueueStatus
from rollmesh.names import parse_job
from services.coordinator.scheduler import PRIORITIES, Projects, RunningJob, WaitingJob, admit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.coordinator.fleet.membership import Fleet
    from services.coordinator.scheduler import Scheduler, Verdict
    from services.coordinator.store import AdapterStore, QueuedJob

SPREAD = 1.5
"""A job may take this many times less or more than its steps so far let expect."""
_MAX_AHEAD = 10


@dataclass(frozen=True, slots=True)
class Progress:
    """A job that this process runs: since when (Unix seconds), from which step, to which."""

    since: float
    from_step: int
    max_steps: int

    def remaining_s(self, step: int, now: float) -> tuple[float, float] | None:
        """At the earliest and at the latest, after `step` steps; None before the first."""
        taken = step - self.from_step
        if taken < 1:
            return None
        expected = (now - self.since) / taken * (self.max_steps - step)
        return expected / SPREAD, expected * SPREAD


class Admission:
    """The last verdicts, and what they tell.

    Args:
        fleet: which base models are served.
        projects: weights and quotas.
        scheduler: tokens of the day; it keeps decisions.
        adapters: how many there are.
        max_running: jobs at once.
    """

    def __init__(
        self,
        fleet: Fleet,
        projects: Projects,
        scheduler: Scheduler,
        adapters: AdapterStore,
        *,
        max_running: int,
    ) -> None:
        self._fleet = fleet
        self._projects = projects
        self._scheduler = scheduler
        self._adapters = adapters
        self._max_running = max_running
        self._running: tuple[RunningJob, ...] = ()
        self._waiting: dict[str, tuple[Verdict, float]] = {}

    async def decide(
        self,
        queue: Sequence[QueuedJob],
        running: Mapping[str, Progress | None],
        retries: Mapping[str, str],
        *,
        now: float,
    ) -> list[Verdict]:
        """A verdict for each job of `queue` that does not run, in the order of their turns.

        What the process before ran goes first, and no quota takes its place away. `running`: None:
        it begins. `retries`: why a job is tried again later.
        """
        queued = {job.name: job for job in queue}
        waiting = [
            (job.phase, _waiting_of(job, order, retries.get(job.name, "")))
            for order, job in enumerate(queue)
            if job.name not in running
        ]
        went_on = [job for phase, job in waiting if phase != "PENDING"]
        begins = [job for phase, job in waiting if phase == "PENDING"]
        self._running = (
            *(
                _running_of(name, queued.get(name), progress, now)
                for name, progress in running.items()
            ),
            *(RunningJob(job.name, job.project, job.base_model, None) for job in went_on),
        )
        adapters = await self._adapters.counts() if any(j.needs_adapter for j in begins) else {}
        served = self._fleet.base_models()
        judge = partial(
            admit,
            max_running=self._max_running,
            trained={model for model in served if self._fleet.trainers(model)},
            sampled={model for model in served if self._fleet.samplers(model)},
            used_today=lambda project: self._scheduler.used_today(project, now),
            num_adapters=lambda project: adapters.get(project, 0),
            now=now,
        )
        verdicts = [
            *judge(went_on, self._running[: len(running)], Projects()),
            *judge(begins, self._running, self._projects),
        ]
        self._waiting = {
            verdict.job.name: (verdict, queued[verdict.job.name].create_time)
            for verdict in verdicts
            if not verdict.start
        }
        return verdicts

    def started(self, name: str, now: float) -> None:
        """Keep it as a decision."""
        decision = types.Decision(now, name, "STARTED", "nothing held it back any more")
        self._scheduler.record(parse_job(name)[0], decision)

    def status(self, name: str) -> QueueStatus | None:
        """Where a job stands; None: it does not wait, or came a moment ago."""
        if name not in self._waiting:
            return None
        verdict, _ = self._waiting[name]
        low, high = verdict.eta_s or (None, None)
        return QueueStatus(
            position=verdict.position,
            rule=verdict.rule,
            reason=verdict.reason,
            eta_low_s=low,
            eta_high_s=high,
        )

    def waiting(self, project: str) -> list[types.Waiting]:
        """The jobs of a project that wait, in the order of their turns."""
        told: list[types.Waiting] = []
        for name, (verdict, since) in self._waiting.items():
            if verdict.job.project == project:
                ahead = [before.subject for before in reversed(told) if before.rule == verdict.rule]
                told.append(
                    types.Waiting(
                        subject=name,
                        rule=verdict.rule,
                        reason=verdict.reason,
                        release=verdict.release,
                        position=verdict.position,
                        since=since,
                        ahead=tuple(ahead[:_MAX_AHEAD]),
                    )
                )
        return told

    def num_running(self, project: str) -> int:
        """Jobs of a project that run."""
        return sum(job.project == project for job in self._running)


def _running_of(
    name: str, job: QueuedJob | None, progress: Progress | None, now: float
) -> RunningJob:
    if job is None:  # It was cancelled, and cleans up.
        return RunningJob(name, parse_job(name)[0], "", (0.0, 0.0))
    remaining_s = progress.remaining_s(job.step, now) if progress else None
    return RunningJob(name, job.project, job.base_model, remaining_s)


def _waiting_of(job: QueuedJob, order: int, retry_reason: str) -> WaitingJob:
    return WaitingJob(
        job.name,
        job.project,
        job.base_model,
        PRIORITIES[job.priority],
        order,
        retry_reason,
        needs_adapter=not job.has_adapter,
        needs_sampler=job.needs_sampler,
    )
