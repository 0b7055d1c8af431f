"""Weighted fair sharing between projects by the tokens they were served at one base model.

A virtual token counter for each project (VTC, "Fairness in Serving Large Language Models",
arXiv:2401.00588): priced tokens over weight. Whoever has the least is served next, so over any time
in which two projects both wait, their tokens are as their weights, up to what is in flight.

Classes of priority share the counter and are lifted each for itself: what a project was served in
a higher class counts in a lower one, and who waited below a busy class is owed nothing above it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.coordinator.scheduler.projects import Projects

MAX_IDLE_ACCOUNTS = 1000
"""Projects remembered at each base model that have nothing waiting or running there. Of more, those
that were there longest ago are forgotten: they come back as newcomers, level with whoever is next.
"""


@dataclass(slots=True)
class Account:
    """What one project was served: priced tokens over its weight.

    `lifts`: by class, what it did not use and is not owed. `length`: tokens that its completions
    have, and `duration_s`: how long its requests have their places, going by the last ones; 0: none
    has ended.
    """

    project: str
    weight: float
    served: float = 0.0
    length: float = 0.0
    duration_s: float = 0.0
    num_queued: int = 0
    num_running: int = 0
    lifts: dict[int, float] = field(default_factory=dict)

    def level(self, priority: int) -> float:
        """Whoever of a class has the least of this is served next."""
        return self.served + self.lifts.get(priority, 0.0)

    def lift(self, priority: int, level: float) -> bool:
        """Raise it to `level`, if it is below."""
        if self.level(priority) >= level:
            return False
        self.lifts[priority] = level - self.served
        return True

    def observe(self, tokens: float, duration_s: float) -> None:
        """A request of its ended: its completions have so many tokens on average."""
        # The last dozen or so count: prompts and policies change as jobs go on.
        self.length += (tokens - self.length) * (1 / 8 if self.length else 1)
        self.duration_s += (duration_s - self.duration_s) * (1 / 8 if self.duration_s else 1)


class Accounts:
    """The accounts of one base model: of who is active there, and of MAX_IDLE_ACCOUNTS others."""

    def __init__(self, projects: Projects) -> None:
        self._projects = projects
        self._accounts: dict[str, Account] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()

    def find(self, project: str) -> Account | None:
        """The account of `project`, if it has one."""
        return self._accounts.get(project)

    def of(self, project: str) -> Account:
        """The account of `project`, which is about to be active."""
        self._idle.pop(project, None)
        account = self._accounts.get(project)
        if account is None:
            account = Account(project, self._projects.of(project).weight)
            self._accounts[project] = account
        return account

    def rest(self, account: Account) -> None:
        """Something of `account` left; if it was the last, the account may be forgotten."""
        if account.num_queued or account.num_running:
            return
        self._idle[account.project] = None
        if len(self._idle) > MAX_IDLE_ACCOUNTS:
            project, _ = self._idle.popitem(last=False)
            del self._accounts[project]

    def active_weight(self) -> float:
        """Sum of the weights of all that have something waiting or running."""
        return sum(
            account.weight
            for project, account in self._accounts.items()
            if project not in self._idle
        )
