"""What each project is entitled to, and what bounds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rollmesh.job import Priority

PRIORITIES: Mapping[Priority, int] = {"low": -1, "normal": 0, "high": 1}
"""The classes of priority: all of a higher one goes before all of a lower one."""
NAMES: Mapping[int, Priority] = {number: name for name, number in PRIORITIES.items()}


@dataclass(frozen=True, slots=True)
class ProjectPolicy:
    """A project's weight and its quotas, as `config.ProjectLimits` says them; None: no bound."""

    weight: float = 1.0
    max_priority: int = 0
    max_running_jobs: int | None = None
    max_adapters: int | None = None
    max_tokens_in_flight: int | None = None
    tokens_per_day: int | None = None


class Projects:
    """The policies of the projects that have one of their own, and the one of all others."""

    def __init__(
        self,
        default: ProjectPolicy = ProjectPolicy(),
        by_id: Mapping[str, ProjectPolicy] | None = None,
    ) -> None:
        self._default = default
        self._by_id = dict(by_id or {})

    def of(self, project: str) -> ProjectPolicy:
        """What holds for the project of that id."""
        return self._by_id.get(project, self._default)
