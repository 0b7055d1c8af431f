"""Which waiting request goes to which sampler next: pure policy, no I/O, no clock."""

from services.coordinator.scheduler.scheduler import (
    Assignment,
    Policy,
    Request,
    SamplerState,
    Scheduler,
)

__all__ = ["Assignment", "Policy", "Request", "SamplerState", "Scheduler"]
