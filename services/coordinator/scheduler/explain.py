"""What holds a waiting request back, in the order in which the scheduler asks.

A rule is named only while it holds: without what it names the request would have its place, or a
later rule is named.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollmesh import types
from services.coordinator.scheduler.projects import NAMES
from services.coordinator.scheduler.quotas import held_tokens
from services.coordinator.scheduler.usage import until_midnight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from services.coordinator.scheduler.places import Places
    from services.coordinator.scheduler.queues import Pool
    from services.coordinator.scheduler.quotas import Quotas
    from services.coordinator.scheduler.requests import Request

MAX_WAITING = 100
"""Told of at once."""
MAX_AHEAD = 10
"""Named of those that go before one."""


@dataclass(frozen=True, slots=True)
class _Ahead:
    """How many go before a request: of classes above; in its own by project, and of its own."""

    higher: int
    others: Mapping[str, int]
    num_own: int


class Explaining:
    """The scheduler's parts, read only."""

    def __init__(self, places: Places, quotas: Quotas) -> None:
        self._places = places
        self._quotas = quotas

    def waiting(
        self,
        pool: Pool,
        project: str,
        wanted: Callable[[Request], bool],
        since: Mapping[int, float],
        now: float,
    ) -> Iterator[types.Waiting]:
        """What is `wanted` of what a project has waiting for one base model, in turn."""
        higher: Counter[str] = Counter()
        same: Counter[str] = Counter()
        own: list[str] = []
        num_own = 0
        priority = None
        for request, may_go in pool.turns(self._goers(pool)):
            if request.priority != priority:
                higher += same
                same.clear()
                num_own = 0
                priority = request.priority
            if request.project == project:
                if wanted(request):
                    others = {other: count for other, count in same.items() if other != project}
                    ahead = _Ahead(higher.total(), others, num_own)
                    rule, reason, release = self._rule(request, pool, ahead, now)
                    num_others = higher.total() - higher[project] + sum(others.values())
                    yield types.Waiting(
                        subject=request.subject,
                        rule=rule,
                        reason=reason,
                        release=release,
                        position=1 + num_others + len(own),
                        since=since[request.id],
                        ahead=tuple(own[: -MAX_AHEAD - 1 : -1]),
                        job=request.job,
                    )
                own.append(request.subject)
                num_own += bool(self._places.serving(pool.base_model, request.job))
            if may_go:
                same[request.project] += 1

    def share(self, pool: Pool, project: str) -> types.Share | None:
        """How it stands at one base model; None: it has not asked for it of late."""
        account = pool.accounts.find(project)
        if account is None:
            return None
        active = account.num_queued or account.num_running
        return types.Share(
            base_model=pool.base_model,
            weight=account.weight,
            virtual_tokens=account.served,
            num_queued=account.num_queued,
            num_running=account.num_running,
            entitled=account.weight / pool.accounts.active_weight() if active else 0.0,
        )

    def quotas(self, project: str) -> tuple[types.Quota, ...]:
        """Those of tokens."""
        standing = self._quotas.of(project)
        in_flight, allowed = standing.in_flight, standing.policy.max_tokens_in_flight
        used = self._quotas.usage.used(project)
        return (
            types.Quota("tokens_in_flight", in_flight, allowed),
            types.Quota("tokens_per_day", used, standing.policy.tokens_per_day),
        )

    def _goers(self, pool: Pool) -> Callable[[Request], bool]:
        """Whether nothing but its turn and room hold a request back; asked in order."""
        blocked: set[tuple[str, int]] = set()

        def may_go(request: Request) -> bool:
            queue = request.project, request.priority
            if not self._places.serving(pool.base_model, request.job):
                return False
            # What tokens in flight hold back is not overtaken by what came later.
            if queue not in blocked and self._missing(request, pool):
                blocked.add(queue)
            return queue not in blocked and not self._quotas.day_used_up(request)

        return may_go

    def _missing(self, request: Request, pool: Pool) -> int:
        standing = self._quotas.of(request.project)
        return standing.missing(request, self._tokens(request, pool))

    def _tokens(self, request: Request, pool: Pool) -> int:
        return held_tokens(request, pool.accounts.of(request.project).length)

    def _rule(
        self, request: Request, pool: Pool, ahead: _Ahead, now: float
    ) -> tuple[str, str, str]:
        """The rule, the reason, and what would release it."""
        model = pool.base_model
        num_serving = self._places.num_serving(model)
        if not num_serving:
            return "NO_SAMPLER", f"no sampler of {model!r} serves", f"a sampler of {model!r}"
        if held := self._quarantine(request, num_serving):
            return held
        if held := self._over_quota(request, pool, now):
            return held
        return self._not_its_turn(request, pool, ahead)

    def _not_its_turn(self, request: Request, pool: Pool, ahead: _Ahead) -> tuple[str, str, str]:
        model = pool.base_model
        their_turns = "their turns, and then a place"
        if ahead.higher:
            name = NAMES[request.priority]
            reason = f"{ahead.higher} requests of classes above {name!r} wait for {model!r}"
            return "PRIORITY", reason, their_turns
        if ahead.num_own:
            return "ORDER", f"{ahead.num_own} requests of its project go first", their_turns
        if ahead.others:
            count = sum(ahead.others.values())
            reason = (
                f"{count} requests of {len(ahead.others)} other projects go first: these had fewer "
                "tokens for their weights"
            )
            return "FAIR_SHARE", reason, their_turns
        num_asked = len(self._places.serving(model, request.job))
        reason = (
            f"it is next; each of the {num_asked} samplers of {model!r} that it may ask is full or "
            f"has {self._places.bound} completions under way"
        )
        return "NO_ROOM", reason, "the end of completions on one of them"

    def _quarantine(self, request: Request, num_serving: int) -> tuple[str, str, str] | None:
        model = request.base_model
        asked = self._places.serving(model, request.job)
        free = self._places.free(model)
        if asked and (not free or any(sampler.address in free for sampler in asked)):
            return None
        num_refused = num_serving - len(asked)
        reason = (
            f"{num_refused} of {num_serving} samplers of {model!r} are in quarantine for "
            f"{request.job}" + (", and only they have a place" if asked else "")
        )
        return "QUARANTINE", reason, "the end of the quarantine, or a place on another sampler"

    def _over_quota(self, request: Request, pool: Pool, now: float) -> tuple[str, str, str] | None:
        standing = self._quotas.of(request.project)
        policy = standing.policy
        if self._quotas.day_used_up(request):
            used = self._quotas.usage.used(request.project)
            reason = f"{used} of {policy.tokens_per_day} tokens of today are used"
            hours = until_midnight(now) / 3600
            release = f"midnight UTC, in {hours:.1f} h"
            if standing.to_come:
                reason += f", and those in flight are expected to draw {standing.to_come} more"
                release += ", or sooner, if these end with fewer"
            return "PROJECT_TOKENS_PER_DAY", reason, release
        if missing := self._missing(request, pool):
            reason = (
                f"{standing.in_flight} of {policy.max_tokens_in_flight} tokens are in flight, and "
                f"it counts {self._tokens(request, pool)}"
            )
            if standing.first and standing.keeps_from(request):
                reason += f"; {standing.first_tokens} are kept for {standing.first.subject}"
            in_s = standing.released_in_s(missing, now)
            release = f"{missing} tokens fewer in flight, in about {in_s:.0f} s"
            return "PROJECT_TOKENS_IN_FLIGHT", reason, release
        return None
