"""The scheduler: classes of priority, fair between projects within, then first come first served.

No sampler of a base model has a place while a request for it waits that may have it; see `places`.
Of the samplers with a place the one where the request costs least gets it; see `routing`.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.errors import Overloaded
from services.coordinator.scheduler.decisions import Decisions
from services.coordinator.scheduler.explain import MAX_WAITING, Explaining
from services.coordinator.scheduler.places import Places, Running
from services.coordinator.scheduler.preemption import preempt
from services.coordinator.scheduler.queues import Pool, Queue, advance_tokens
from services.coordinator.scheduler.quotas import Quotas, held_tokens
from services.coordinator.scheduler.requests import Assignment, Request
from services.coordinator.scheduler.routing import expected_length

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from rollmesh.errors import QuotaExceeded
    from services.coordinator.scheduler.fairness import Account
    from services.coordinator.scheduler.projects import Projects
    from services.coordinator.scheduler.requests import SamplerState


class Scheduler:
    """Every request is submitted, then assigned to a sampler, then finished; or withdrawn.

    Times are Unix seconds.
    """

    def __init__(
        self,
        *,
        max_running_completions: int,
        max_queued_requests: int,
        projects: Projects,
        prompt_token_price: float,
    ) -> None:
        """Bounds for each sampler and for each project's queue at each base model.

        `prompt_token_price`: what a prompt's token counts for fairness; a drawn one counts 1.
        """
        self.max_running_completions = max_running_completions
        self._max_queued_requests = max_queued_requests
        self._projects = projects
        self._price = prompt_token_price
        self._pools: dict[str, Pool] = {}
        self._places = Places(max_running_completions)
        self._quotas = Quotas(projects)
        self._decisions = Decisions()
        self._explaining = Explaining(self._places, self._quotas)
        # Of those that wait: since when, and where they will have the place of a preempted one.
        self._since: dict[int, float] = {}
        self._promised: dict[int, str] = {}

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return len(self._since)

    def outstanding(self, address: str) -> int:
        """Completions under way on one sampler."""
        return self._places.line(address).num_completions

    def outstanding_tokens(self, address: str) -> int:
        """Tokens that what is under way on one sampler is expected to cost yet."""
        return self._places.line(address).num_tokens

    def has_room(self, request: Request) -> bool:
        """Whether its project's queue is not full."""
        pool = self._pools.get(request.base_model)
        account = pool.accounts.find(request.project) if pool else None
        return account is None or account.num_queued < self._max_queued_requests

    def submit(self, request: Request, now: float) -> None:
        """Put `request` at the end of its project's queue, or, resumed, before those that are not.

        Resumed ones had a place before, so there are no more of them than fit on the samplers: no
        bound refuses them, and no day's quota holds back what had begun.

        Raises:
            QuotaExceeded: it is interactive and would have to wait for a quota of its project.
            Overloaded: the queue is full. Each project has its own, so nobody fills another's.
        """
        self._quotas.usage.at(now)
        pool = self._pools.get(request.base_model)
        if pool is None:
            pool = Pool(request.base_model, self._projects, self._price)
            self._pools[request.base_model] = pool
        try:
            self._check_bounds(request, pool, now)
        except Overloaded as error:
            # What a job asks for comes again and again, and would leave no room for anything else.
            if not request.job:
                self._decisions.add(now, request, "REFUSED", "{}", str(error))
            raise
        pool.add(request)
        self._quotas.enter(request)
        self._since[request.id] = now

    def withdraw(self, request: Request) -> None:
        """Take a request that still waits out of its queue."""
        pool = self._pools[request.base_model]
        account = self._leave_queue(request, pool)
        self._quotas.leave(request)
        pool.accounts.rest(account)

    def assign(self, samplers: Iterable[SamplerState], now: float) -> list[Assignment]:
        """Take requests off the queues, the next first, until no sampler has a place for any.

        `samplers`: all that serve. It costs least if they are the same objects as last time. To be
        asked again whenever something was submitted, ended or heard of a sampler, and at midnight
        UTC, when the quotas of a day begin anew.
        """
        self._quotas.usage.at(now)
        self._see(samplers)
        changed = self._quotas.changed()
        assignments: list[Assignment] = []
        for pool in self._pools.values():
            pool.unpark(changed)
            if pool.num_queued and self._places.free(pool.base_model):
                self._assign(pool, now, assignments)
        return assignments

    def refused(self, now: float) -> list[tuple[Request, QuotaExceeded]]:
        """Interactive requests whose project used its day up while they waited, each told once.

        They are the caller's to withdraw.
        """
        self._quotas.usage.at(now)
        refused = self._quotas.refused(now)
        for request, error in refused:
            self._decisions.add(now, request, "REFUSED", "{}", str(error))
        return refused

    def preempt(self, samplers: Iterable[SamplerState], now: float) -> list[int]:
        """Ids of the running requests to stop for those that wait in a higher class.

        To be asked after `assign`. As few as needed; see `preemption`. Who was named once is taken
        for gone, and is not named again.
        """
        self._quotas.usage.at(now)
        self._see(samplers)
        return [
            victim.request.id
            for pool in self._pools.values()
            for victim in preempt(pool, self._places, self._quotas, self._promised)
        ]

    def progress(self, request_id: int, *, num_tokens: int, num_finished: int) -> None:
        """An assigned request has got `num_tokens` more tokens; so many completions ended."""
        running = self._places.running[request_id]
        self._places.progress(running, num_tokens=num_tokens, num_finished=num_finished)
        self._quotas.progress(running, num_tokens=num_tokens, num_finished=num_finished)
        running.account.num_running -= num_finished
        running.pool.stirred = running.pool.stirred or num_finished > 0
        # Beyond what was expected, tokens count as they come and not only when all have come.
        total = running.pool.price(running.request, running.num_tokens)
        if total > running.charged:
            self._charge(running, total)

    def finish(
        self, request_id: int, *, completed: bool, now: float, preempted: bool = False
    ) -> None:
        """An assigned request has ended or was cut off; what it did not use is given back.

        `preempted`: it was cut off because `preempt` named it.
        """
        self._quotas.usage.at(now)
        running = self._places.leave(request_id)
        request, account, pool = running.request, running.account, running.pool
        self._charge(running, pool.price(request, running.num_tokens))
        if completed and running.num_tokens and not request.resumed:
            length = running.num_tokens / request.num_completions
            account.observe(length, now - running.started)
        pool.stirred = True
        if request.preemptible and not running.stopping:
            pool.num_preemptible[request.priority] -= 1
        self._quotas.finish(running)
        account.num_running -= running.num_completions
        pool.accounts.rest(account)
        if preempted:
            self._decisions.add(
                now,
                request,
                "PREEMPTED",
                "for one of a higher class; it had {} tokens, and goes on in its project's turn",
                running.num_tokens,
                address=running.address,
            )

    def explain(self, project: str, subject: str, now: float) -> types.Schedule:
        """What of `project` waits and why, what was decided of it last, and how it stands.

        `subject`: only what is of this request, or of this job, by name; empty: all. Jobs that
        wait, and quotas of anything but tokens, are not the scheduler's.
        """
        self._quotas.usage.at(now)

        def wanted(request: Request) -> bool:
            return not subject or subject in {request.subject, request.job}

        waiting = (
            waiting
            for pool in self._pools.values()
            for waiting in self._explaining.waiting(pool, project, wanted, self._since, now)
        )
        shares = (self._explaining.share(pool, project) for pool in self._pools.values())
        return types.Schedule(
            waiting=tuple(islice(waiting, MAX_WAITING)),
            num_waiting=sum(
                wanted(request)
                for pool in self._pools.values()
                for request in pool.of_project(project)
            ),
            decisions=self._decisions.of(project, subject),
            shares=tuple(share for share in shares if share),
            quotas=self._explaining.quotas(project),
        )

    def record(self, project: str, decision: types.Decision) -> None:
        """Keep a decision that was made elsewhere: about a job."""
        self._decisions.record(project, decision)

    def used_today(self, project: str, now: float) -> int:
        """Tokens of `project` on the day of `now`, in UTC: of prompts, and drawn."""
        self._quotas.usage.at(now)
        return self._quotas.usage.used(project)

    def restore_usage(self, project: str, day: int, tokens: int) -> None:
        """So many are written down for `project` and a day, counted from 1970."""
        self._quotas.usage.restore(project, day, tokens)

    def take_usage(self) -> dict[tuple[str, int], tuple[int, int]]:
        """Tokens of prompts and drawn ones since this was last asked, by project and day."""
        return self._quotas.usage.take()

    def _see(self, samplers: Iterable[SamplerState]) -> None:
        if self._places.see(samplers):
            self._quotas.fleet_changed(
                lambda request: bool(self._places.serving(request.base_model, request.job))
            )
            for pool in self._pools.values():
                pool.unpark(None)

    def _check_bounds(self, request: Request, pool: Pool, now: float) -> None:
        account = pool.accounts.find(request.project)
        queue = pool.queue_of(request)
        self._quotas.refuse_over(request, account, self._head(queue) if queue else None, now)
        num_queued = account.num_queued if account else 0
        if not request.resumed and num_queued >= self._max_queued_requests:
            raise Overloaded(
                f"project {request.project!r} has {num_queued} sample requests waiting for "
                f"{request.base_model!r} already, which is the most",
                project=request.project,
                base_model=request.base_model,
                value=num_queued,
                allowed=self._max_queued_requests,
                position=num_queued + 1,
            )

    def _leave_queue(self, request: Request, pool: Pool) -> Account:
        del self._since[request.id]
        self._promised.pop(request.id, None)
        return pool.remove(request)

    def _assign(self, pool: Pool, now: float, assignments: list[Assignment]) -> None:
        free = self._places.free(pool.base_model)
        for waiting in pool.classes:
            while free and (request := waiting.next(self._first)):
                num_projects = len(waiting.queues)
                waited_s = now - self._since[request.id]
                running = self._start(request, pool, now)
                assignments.append(Assignment(request, running.address))
                self._decisions.add(
                    now,
                    request,
                    "ASSIGNED",
                    "the turn of its project among {} after {:.3f} s",
                    num_projects,
                    waited_s,
                    address=running.address,
                )
            waiting.restore(self._holds_itself_back)

    def _first(self, queue: Queue) -> Request | None:
        """The first of a project's that may have one of the free places now.

        What its quota holds back is not overtaken by what came later.
        """
        refused: Collection[str] | None = None
        for request in queue:
            if refused is None:
                refused = self._places.refused(request.base_model)
            if request.job not in refused:
                return request if self._quotas.fits(request, queue.account) else None
        return None

    def _holds_itself_back(self, queue: Queue) -> bool:
        """Whether it is not for want of room that a project was passed over.

        Then it is not asked again before a request of it came or ended, the day or the fleet did.
        """
        head = self._head(queue)
        if head is None:
            return True
        return not self._quotas.may_begin(head, held_tokens(head, queue.account.length))

    def _head(self, queue: Queue) -> Request | None:
        """The first that some sampler may be asked for."""
        return next(
            (one for one in queue if self._places.serving(one.base_model, one.job)),
            None,
        )

    def _start(self, request: Request, pool: Pool, now: float) -> Running:
        address = self._places.cheapest(request, self._promised.get(request.id, ""))
        account = self._leave_queue(request, pool)
        pool.served(account, request.priority)
        running = Running(
            request,
            address,
            pool,
            account,
            expected_length(request, account.length),
            now,
            request.num_completions,
        )
        self._places.join(running)
        self._quotas.start(running)
        pool.num_preemptible[request.priority] += request.preemptible
        account.num_running += request.num_completions
        self._charge(running, pool.price(request, advance_tokens(request, account)))
        return running

    def _charge(self, running: Running, total: float) -> None:
        """Make `total` what the request has been charged."""
        if total != running.charged:
            running.pool.charge(running.account, total - running.charged)
            running.charged = total
