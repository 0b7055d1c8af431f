"""Which waiting request goes to which sampler next, and which job begins: no I/O, no clock."""

from services.coordinator.scheduler.jobs import RunningJob, Verdict, WaitingJob, admit
from services.coordinator.scheduler.projects import PRIORITIES, ProjectPolicy, Projects
from services.coordinator.scheduler.requests import Assignment, Policy, Request, SamplerState
from services.coordinator.scheduler.routing import prefixes_of
from services.coordinator.scheduler.scheduler import Scheduler

__all__ = [
    "PRIORITIES",
    "Assignment",
    "Policy",
    "ProjectPolicy",
    "Projects",
    "Request",
    "RunningJob",
    "SamplerState",
    "Scheduler",
    "Verdict",
    "WaitingJob",
    "admit",
    "prefixes_of",
]
