"""Why what waits in a project waits: the core of FleetService.ExplainSchedule."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.errors import InvalidRequest
from rollmesh.names import parse_job, parse_project

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.coordinator.admission import Admission
    from services.coordinator.scheduler import Projects, Scheduler
    from services.coordinator.store import AdapterStore, JobStore

MAX_WAITING = 100
_REQUEST = re.compile(r"projects/([a-z0-9-]+)/requests/[0-9]{1,18}")


class Explaining:
    """Puts what is known of jobs before what the scheduler knows of requests.

    Args:
        scheduler: the requests, the decisions and the shares.
        admission: the jobs that wait.
        jobs: which jobs there are.
        adapters: how many there are.
        projects: their quotas.
        clock: Unix seconds.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        admission: Admission,
        jobs: JobStore,
        adapters: AdapterStore,
        projects: Projects,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._scheduler = scheduler
        self._admission = admission
        self._jobs = jobs
        self._adapters = adapters
        self._projects = projects
        self._clock = clock

    async def explain(self, parent: str, subject: str) -> types.Schedule:
        """All of a project, or what concerns `subject`, a job or a request of it.

        Raises:
            InvalidRequest: the names.
            NotFound: no such job.
        """
        project = parse_project(parent, field="project")
        if subject and not _is_request(subject, project):
            await self._jobs.get(_job(subject, project))
        schedule = self._scheduler.explain(project, subject, self._clock())
        jobs = [
            waiting
            for waiting in self._admission.waiting(project)
            if subject in {"", waiting.subject}
        ]
        policy = self._projects.of(project)
        num_adapters = await self._adapters.count(project)
        return replace(
            schedule,
            waiting=(*jobs, *schedule.waiting)[:MAX_WAITING],
            num_waiting=len(jobs) + schedule.num_waiting,
            quotas=(
                types.Quota(
                    "running_jobs", self._admission.num_running(project), policy.max_running_jobs
                ),
                types.Quota("adapters", num_adapters, policy.max_adapters),
                *schedule.quotas,
            ),
        )


def _is_request(subject: str, project: str) -> bool:
    found = _REQUEST.fullmatch(subject)
    if found is None:
        return False
    _check_project(subject, found[1], project)
    return True


def _job(subject: str, project: str) -> str:
    owner, _ = parse_job(subject, field="subject")
    _check_project(subject, owner, project)
    return subject


def _check_project(subject: str, owner: str, project: str) -> None:
    if owner != project:
        raise InvalidRequest(
            f"subject: {subject} is not of projects/{project}",
            field="subject",
            value=subject,
            allowed=f"projects/{project}/jobs/J or projects/{project}/requests/R",
        )
