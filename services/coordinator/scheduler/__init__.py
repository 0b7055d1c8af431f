"""Which waiting request goes to which sampler next: pure policy, no I/O, no clock."""

from services.coordinator.scheduler.requests import Assignment, Policy, Request, SamplerState
from services.coordinator.scheduler.routing import prefixes_of
from services.coordinator.scheduler.scheduler import Scheduler

__all__ = ["Assignment", "Policy", "Request", "SamplerState", "Scheduler", "prefixes_of"]
