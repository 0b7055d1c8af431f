"""Quotas of the tokens of a project: how many are in flight at once, and how many a day.

A request in flight counts its prompt, and for each of its completions that has not ended
`max_tokens`, or, where it has none, the length that its project's completions have. What is given a
place never brings the sum over the quota. A request larger than all of it runs alone.

Of a day counts what was used and what those in flight are yet to draw, expected in the same way:
nothing begins when that is all of the quota. So what is used exceeds it by one request at most, and
by what completions without `max_tokens` are longer than expected; and by what was resumed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rollmesh.errors import QuotaExceeded
from services.coordinator.scheduler.routing import expected_length
from services.coordinator.scheduler.usage import Usage, until_midnight

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from services.coordinator.scheduler.fairness import Account
    from services.coordinator.scheduler.places import Running
    from services.coordinator.scheduler.projects import ProjectPolicy, Projects
    from services.coordinator.scheduler.requests import Request

MIN_RETRY_S = 0.1
"""Nobody is told to come back earlier."""


def held_tokens(request: Request, of_project: float) -> int:
    """What it counts while it is in flight; completions of its project had `of_project` tokens."""
    return request.num_prompt_tokens + request.num_completions * held_each(request, of_project)


def held_each(request: Request, of_project: float) -> int:
    """What each of its completions counts until it ends."""
    if request.max_tokens is not None:
        return request.max_tokens
    return round(expected_length(request, of_project))


@dataclass(slots=True)
class Standing:
    """A project that has something waiting or running.

    `to_come`: tokens that those in flight are yet to draw, if it has a quota of a day.

    `first`: the request that what is released is kept for, with what it will count: it did not fit
    when there was a place, and small ones of a class no higher do not overtake it for ever.
    """

    policy: ProjectPolicy
    in_flight: int = 0
    first: Request | None = None
    first_tokens: int = 0
    num_requests: int = 0
    running: dict[int, Running] = field(default_factory=dict)
    to_come: int = 0
    # Waiting ones that are refused when the day is used up.
    refusable: dict[int, Request] = field(default_factory=dict)

    def missing(self, request: Request, tokens: int) -> int:
        """Tokens that have to be released before `request`, of so many, fits; 0: it does."""
        allowed = self.policy.max_tokens_in_flight
        if allowed is None:
            return 0
        kept = self.first_tokens if self.keeps_from(request) else 0
        used = self.in_flight + kept
        return max(min(used, used + tokens - allowed), 0)

    def keeps_from(self, request: Request) -> bool:
        """Whether what is released is kept for another request.

        Not from one of the same queue: what comes up there goes before it, as it was resumed since.
        """
        first = self.first
        if first is None or first.priority < request.priority:
            return False
        return first.priority > request.priority or first.base_model != request.base_model

    def released_in_s(self, tokens: int, now: float) -> float:
        """Seconds until so many tokens are expected to be released."""
        end = now
        for running in self.running.values():
            if tokens <= 0:
                break
            duration_s = running.account.duration_s or QuotaExceeded.retry_after_s
            end = max(end, running.started + duration_s)
            tokens -= running.held
        return max(end - now, MIN_RETRY_S)


class Quotas:
    """How the projects stand: of each that has something waiting or running, and today's usage."""

    def __init__(self, projects: Projects) -> None:
        self.usage = Usage()
        self._projects = projects
        self._standings: dict[str, Standing] = {}
        # Projects whose `first` is set.
        self._kept: set[str] = set()
        # Since `changed`.
        self._changed: set[str] = set()
        # Projects whose day was used up while `refusable` ones waited.
        self._over: set[str] = set()
        self._day = self.usage.day

    def of(self, project: str) -> Standing:
        """How `project` stands."""
        return self._standings.get(project) or Standing(self._projects.of(project))

    def changed(self) -> Collection[str] | None:
        """Projects of which more may go than when this was last asked; None: of any."""
        changed, self._changed = self._changed, set()
        day, self._day = self._day, self.usage.day
        return changed if day == self._day else None

    def enter(self, request: Request) -> None:
        """It waits."""
        self._changed.add(request.project)
        self._standings[request.project] = standing = self.of(request.project)
        standing.num_requests += 1
        if not request.job and not request.resumed:
            standing.refusable[request.id] = request

    def leave(self, request: Request) -> None:
        """It neither waits nor runs any more."""
        self._changed.add(request.project)
        standing = self._standings[request.project]
        standing.num_requests -= 1
        standing.refusable.pop(request.id, None)
        self._forget_first(standing, request)
        if not standing.num_requests:
            del self._standings[request.project]

    def day_used_up(self, request: Request, before: int = 0) -> bool:
        """Whether it may not begin today, or not yet; `before`: tokens of others that do.

        What had begun goes on, and so does an interactive call that had a place.
        """
        standing = self.of(request.project)
        allowed = standing.policy.tokens_per_day
        if allowed is None or (request.resumed and not (request.anew and request.job)):
            return False
        return self.usage.used(request.project) + standing.to_come + before >= allowed

    def may_begin(self, request: Request, tokens: int, before: int = 0) -> bool:
        """Whether the quotas have room for `request`, of so many tokens, and others `before` it."""
        missing = self.of(request.project).missing(request, tokens + before)
        return not missing and not self.day_used_up(request, before)

    def fits(self, request: Request, account: Account) -> bool:
        """Whether a place may be given to `request`; if not, what is released is kept for it."""
        standing = self._standings[request.project]
        policy = standing.policy
        if policy.tokens_per_day is not None and self.day_used_up(request):
            return False
        if policy.max_tokens_in_flight is None:
            return True
        tokens = held_tokens(request, account.length)
        if not standing.missing(request, tokens):
            return True
        if not standing.keeps_from(request):
            standing.first, standing.first_tokens = request, tokens
            self._kept.add(request.project)
        return False

    def start(self, running: Running) -> None:
        """It has its place."""
        request = running.request
        standing = self._standings[request.project]
        running.held_each = held_each(request, running.account.length)
        running.held = request.num_prompt_tokens + request.num_completions * running.held_each
        standing.in_flight += running.held
        standing.running[request.id] = running
        standing.refusable.pop(request.id, None)
        self._forget_first(standing, request)
        if standing.policy.tokens_per_day is not None:
            self._expect(running, running.held - request.num_prompt_tokens)
        if not request.resumed:
            self._count(request.project, prompt=request.num_prompt_tokens)

    def progress(self, running: Running, *, num_tokens: int, num_finished: int) -> None:
        """It got tokens, and some of its completions ended."""
        request = running.request
        if num_tokens:
            self._count(request.project, drawn=num_tokens)
        if running.to_come:
            most = running.held_each * running.num_completions
            self._expect(running, max(min(running.to_come - num_tokens, most), 0))
        if num_finished:
            self._changed.add(request.project)
            self._release(running, running.held_each * num_finished)

    def finish(self, running: Running) -> None:
        """It has its place no more."""
        request = running.request
        standing = self._standings[request.project]
        self._release(running, running.held)
        self._expect(running, 0)
        del standing.running[request.id]
        self.leave(request)

    def fleet_changed(self, may_be_asked: Callable[[Request], bool]) -> None:
        """Nothing is kept for a request that no sampler may be asked for."""
        for project in list(self._kept):
            standing = self._standings[project]
            if standing.first and not may_be_asked(standing.first):
                self._forget_first(standing, standing.first)

    def refused(self, now: float) -> list[tuple[Request, QuotaExceeded]]:
        """Waiting interactive requests that the day was used up for, each told once."""
        refused: list[tuple[Request, QuotaExceeded]] = []
        over, self._over = self._over, set()
        for project in sorted(over):
            standing = self.of(project)
            if not self._used_up(project, standing.policy):
                continue
            requests = list(standing.refusable.values())
            standing.refusable.clear()
            refused += [
                (request, self._day_exceeded(request, standing, now)) for request in requests
            ]
        return refused

    def refuse_over(
        self, request: Request, account: Account | None, head: Request | None, now: float
    ) -> None:
        """Refuse an interactive request that would have to wait for a quota.

        `head`: who goes first of its queue: what holds that back holds `request` back too.

        Raises:
            QuotaExceeded: with the quota, its use, the bound, and when to come back.
        """
        if request.job or request.resumed:
            return
        standing = self.of(request.project)
        policy = standing.policy
        if self.day_used_up(request):
            raise self._day_exceeded(request, standing, now)
        if policy.max_tokens_in_flight is None:
            return
        length = account.length if account else 0.0
        for first in (request, head):
            if first and (missing := standing.missing(first, held_tokens(first, length))):
                raise _exceeded(
                    request,
                    standing,
                    "tokens_in_flight",
                    standing.in_flight,
                    policy.max_tokens_in_flight,
                    standing.released_in_s(missing, now),
                )

    def _day_exceeded(self, request: Request, standing: Standing, now: float) -> QuotaExceeded:
        """What is in flight may end sooner than was expected, and then it is not for midnight."""
        policy = standing.policy
        used = self.usage.used(request.project)
        retry_after_s = until_midnight(now)
        if not self._used_up(request.project, policy):
            used += standing.to_come
            retry_after_s = min(retry_after_s, standing.released_in_s(1, now))
        return _exceeded(
            request, standing, "tokens_per_day", used, policy.tokens_per_day, retry_after_s
        )

    def _used_up(self, project: str, policy: ProjectPolicy) -> bool:
        allowed = policy.tokens_per_day
        return allowed is not None and self.usage.used(project) >= allowed

    def _count(self, project: str, *, prompt: int = 0, drawn: int = 0) -> None:
        self.usage.count(project, prompt=prompt, drawn=drawn)
        standing = self._standings[project]
        if standing.refusable and self._used_up(project, standing.policy):
            self._over.add(project)

    def _expect(self, running: Running, tokens: int) -> None:
        """So many are to come of it."""
        self._standings[running.request.project].to_come += tokens - running.to_come
        running.to_come = tokens

    def _release(self, running: Running, tokens: int) -> None:
        self._standings[running.request.project].in_flight -= tokens
        running.held -= tokens

    def _forget_first(self, standing: Standing, request: Request) -> None:
        if standing.first and standing.first.id == request.id:
            standing.first = None
            standing.first_tokens = 0
            self._kept.discard(request.project)


def _exceeded(
    request: Request,
    standing: Standing,
    quota: str,
    value: int,
    allowed: int | None,
    retry_after_s: float,
) -> QuotaExceeded:
    error = QuotaExceeded(
        f"project {request.project!r} has used {value} {quota.replace('_', ' ')} of {allowed}",
        project=request.project,
        quota=quota,
        value=value,
        allowed=allowed,
        position=standing.num_requests - len(standing.running) + 1,
    )
    error.retry_after_s = retry_after_s
    return error
