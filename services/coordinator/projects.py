"""What the configuration says of projects, as the scheduler takes it; and what they may ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh.errors import InvalidRequest
from services.coordinator.scheduler.projects import PRIORITIES, ProjectPolicy, Projects

if TYPE_CHECKING:
    from rollmesh.job import Priority
    from services.coordinator.config import CoordinatorConfig, ProjectLimits


def projects_of(config: CoordinatorConfig) -> Projects:
    """The limits of all projects."""
    return Projects(
        _policy(config.default_project), {each.id: _policy(each) for each in config.projects}
    )


def check_priority(policy: ProjectPolicy, priority: str) -> Priority:
    """The class of a project's call or job that asks for `priority`; "" is normal.

    A project that may not have even that has its highest instead: "normal" is what clients say who
    say nothing.

    Raises:
        InvalidRequest: there is no such class, or it is above the project's highest.
    """
    allowed = [name for name, number in PRIORITIES.items() if number <= policy.max_priority]
    asked = priority or "normal"
    for name in allowed:
        if name == asked:
            return name
    if asked == "normal":
        return allowed[-1]
    problem = "above the project's max_priority" if asked in PRIORITIES else "no class"
    raise InvalidRequest(
        f"priority: {priority!r} is {problem}; allowed are {', '.join(allowed)}",
        field="priority",
        value=priority,
        allowed=", ".join(allowed),
    )


def _policy(limits: ProjectLimits) -> ProjectPolicy:
    return ProjectPolicy(
        weight=limits.weight,
        max_priority=PRIORITIES[limits.max_priority],
        max_running_jobs=limits.max_running_jobs,
        max_adapters=limits.max_adapters,
        max_tokens_in_flight=limits.max_tokens_in_flight,
        tokens_per_day=limits.tokens_per_day,
    )
