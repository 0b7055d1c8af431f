"""The scheduler: a queue for each project, fair between them, first come first served within.

Admission is by what runs: a sampler with fewer than `max_running_completions` gets the next request
whole. So no sampler of a base model has a free place while a request for it waits, a large request
is never overtaken for ever by small ones, and at most one request's completions exceed the bound.
Among the samplers with a free place the one where the request costs least gets it; see `routing`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from rollmesh.errors import Overloaded
from services.coordinator.scheduler.fairness import TokenCounters
from services.coordinator.scheduler.requests import Assignment, Request, SamplerState
from services.coordinator.scheduler.routing import (
    Line,
    Prefixes,
    cost,
    expected_length,
    outstanding_tokens,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


@dataclass(slots=True)
class _Running:
    request: Request
    address: str
    num_completions: int
    expected_length: float
    charged: float = 0.0
    num_tokens: int = 0

    @property
    def outstanding_tokens(self) -> int:
        return outstanding_tokens(
            self.request, self.expected_length, self.num_tokens, self.num_completions
        )


class _Pool:
    """One base model: who waits for it, and what each project got of it."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.counters = TokenCounters(weights)
        self.queues: dict[str, deque[Request]] = {}

    def remove(self, request: Request) -> None:
        """`request` waits no more."""
        queue = self.queues[request.project]
        queue.remove(request)
        if not queue:
            del self.queues[request.project]

    def next_for(self, samplers: Sequence[SamplerState]) -> Request | None:
        """The first of the fairest project's that one of `samplers` may be asked for."""
        firsts = {
            project: request
            for project, queue in self.queues.items()
            if (request := _first_that_may_ask(queue, samplers))
        }
        return firsts[self.counters.next_of(firsts)] if firsts else None


class Scheduler:
    """Every request is submitted, then assigned to a sampler, then finished; or withdrawn."""

    def __init__(
        self,
        *,
        max_running_completions: int,
        max_queued_requests: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Bounds for each sampler and for each project's queue; weights by project, default 1."""
        self.max_running_completions = max_running_completions
        self._max_queued_requests = max_queued_requests
        self._weights = weights or {}
        self._pools: dict[str, _Pool] = {}
        self._running: dict[int, _Running] = {}
        # By address; a line only where something runs, prefixes only of samplers that serve.
        self._lines: dict[str, Line] = {}
        self._prefixes: dict[str, Prefixes] = {}

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return sum(len(queue) for pool in self._pools.values() for queue in pool.queues.values())

    def outstanding(self, address: str) -> int:
        """Completions under way on one sampler."""
        return self._line(address).num_completions

    def outstanding_tokens(self, address: str) -> int:
        """Tokens that what is under way on one sampler is expected to cost yet."""
        return self._line(address).num_tokens

    def submit(self, request: Request) -> None:
        """Put `request` at the end of its project's queue, or, resumed, before those that are not.

        Resumed ones had a place before, so there are no more of them than fit on the samplers.

        Raises:
            Overloaded: the queue is full. Each project has its own, so nobody fills another's.
        """
        pool = self._pools.setdefault(request.base_model, _Pool(self._weights))
        queue = pool.queues.get(request.project)
        if queue is None:
            pool.counters.arrive(request.project, pool.queues)
            queue = pool.queues[request.project] = deque()
        if request.resumed:
            ahead = sum(1 for _ in takewhile(lambda waiting: waiting.resumed, queue))
            queue.insert(ahead, request)
            return
        if len(queue) >= self._max_queued_requests:
            raise Overloaded(
                f"project {request.project!r} has {len(queue)} sample requests waiting for "
                f"{request.base_model!r} already, which is the most",
                project=request.project,
                base_model=request.base_model,
                value=len(queue),
                allowed=self._max_queued_requests,
            )
        queue.append(request)

    def withdraw(self, request: Request) -> None:
        """Take a request that still waits out of its queue."""
        self._pools[request.base_model].remove(request)

    def assign(self, samplers: Sequence[SamplerState]) -> list[Assignment]:
        """Take requests off the queues, fairest first, until no sampler has room for any."""
        assignments: list[Assignment] = []
        self._prefixes = {
            sampler.address: self._prefixes.get(sampler.address) or Prefixes()
            for sampler in samplers
        }
        for base_model, pool in self._pools.items():
            serving = [sampler for sampler in samplers if sampler.base_model == base_model]
            while pool.queues and (free := self._with_room(serving)):
                request = pool.next_for(free)
                if request is None:
                    break
                pool.remove(request)
                sampler = self._cheapest(request, _may_ask(request.job, free))
                self._start(request, sampler.address)
                assignments.append(Assignment(request, sampler.address))
        return assignments

    def progress(self, request_id: int, *, num_tokens: int, num_finished: int) -> None:
        """An assigned request has got `num_tokens` more tokens; so many completions ended."""
        running = self._running[request_id]
        self._leave(running)
        running.num_tokens += num_tokens
        running.num_completions -= num_finished
        self._join(running)
        # Beyond what was expected, tokens count as they come and not only when all have come.
        cost = running.request.num_prompt_tokens + running.num_tokens
        self._charge(running, max(cost, running.charged))

    def finish(self, request_id: int, *, completed: bool) -> None:
        """An assigned request has ended or was cut off; what it did not use is given back."""
        running = self._running.pop(request_id)
        request = running.request
        self._leave(running)
        self._charge(running, request.num_prompt_tokens + running.num_tokens)
        if completed and running.num_tokens and not request.resumed:
            length = running.num_tokens / request.num_completions
            self._pools[request.base_model].counters.observe_length(request.project, length)

    def _with_room(self, samplers: Sequence[SamplerState]) -> list[SamplerState]:
        return [
            sampler
            for sampler in samplers
            if not sampler.full and self.outstanding(sampler.address) < self.max_running_completions
        ]

    def _cheapest(self, request: Request, samplers: Sequence[SamplerState]) -> SamplerState:
        return min(samplers, key=lambda sampler: self._rank(request, sampler))

    def _rank(self, request: Request, sampler: SamplerState) -> tuple[float, int, str]:
        """Smallest where the request costs least, then where the fewest completions run."""
        address = sampler.address
        tokens = cost(request, sampler, self._line(address), self._prefixes[address])
        return tokens, self.outstanding(address), address

    def _start(self, request: Request, address: str) -> None:
        of_project = self._pools[request.base_model].counters.expected_length(request.project)
        running = _Running(
            request, address, request.num_completions, expected_length(request, of_project)
        )
        self._running[request.id] = running
        self._join(running)
        self._prefixes[address].remember(request)
        # Charged in advance, as if it were served: else whoever has the least would be given every
        # free place at once, before its first token counts.
        self._charge(running, request.num_prompt_tokens + of_project * request.num_completions)

    def _line(self, address: str) -> Line:
        return self._lines.get(address) or Line()

    def _join(self, running: _Running) -> None:
        line = self._lines.setdefault(running.address, Line())
        line.num_requests += 1
        line.num_completions += running.num_completions
        line.num_tokens += running.outstanding_tokens
        if running.request.policy:
            line.policies[running.request.policy] += 1

    def _leave(self, running: _Running) -> None:
        line = self._lines[running.address]
        line.num_requests -= 1
        line.num_completions -= running.num_completions
        line.num_tokens -= running.outstanding_tokens
        if running.request.policy:
            line.policies[running.request.policy] -= 1
            if not line.policies[running.request.policy]:
                del line.policies[running.request.policy]
        if not line.num_requests:
            del self._lines[running.address]

    def _charge(self, running: _Running, total: float) -> None:
        """Make `total` what the request has been charged."""
        counters = self._pools[running.request.base_model].counters
        counters.charge(running.request.project, total - running.charged)
        running.charged = total


def _may_ask(job: str, samplers: Sequence[SamplerState]) -> list[SamplerState]:
    return [sampler for sampler in samplers if job not in sampler.refused_by]


def _first_that_may_ask(
    queue: Iterable[Request], samplers: Sequence[SamplerState]
) -> Request | None:
    return next((request for request in queue if _may_ask(request.job, samplers)), None)
