"""The scheduler: a queue for each project, fair between them, first come first served within.

Admission is by what runs: a sampler with fewer than `max_running_completions` gets the next request
whole. So no sampler of a base model has a free place while a request for it waits, a large request
is never overtaken for ever by small ones, and at most one request's completions exceed the bound.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollmesh.errors import Overloaded
from services.coordinator.scheduler.fairness import TokenCounters

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

Policy = tuple[str, int]
"""An adapter's name and policy_version."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the scheduler knows of a sample request. `policy` None: the base model itself."""

    id: int
    project: str
    base_model: str
    policy: Policy | None
    num_prompt_tokens: int
    num_completions: int


@dataclass(frozen=True, slots=True)
class SamplerState:
    """A sampler that serves, with the policies that it holds."""

    address: str
    base_model: str
    loaded: Collection[Policy]


@dataclass(frozen=True, slots=True)
class Assignment:
    """`request` goes to the sampler at `address` now."""

    request: Request
    address: str


@dataclass(slots=True)
class _Running:
    request: Request
    address: str
    num_completions: int
    charged: float
    num_tokens: int = 0


class _Pool:
    """One base model: who waits for it, and what each project got of it."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.counters = TokenCounters(weights)
        self.queues: dict[str, deque[Request]] = {}


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
        self._outstanding: dict[str, int] = {}

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return sum(len(queue) for pool in self._pools.values() for queue in pool.queues.values())

    def outstanding(self, address: str) -> int:
        """Completions under way on one sampler."""
        return self._outstanding.get(address, 0)

    def submit(self, request: Request) -> None:
        """Put `request` at the end of its project's queue.

        Raises:
            Overloaded: the queue is full. Each project has its own, so nobody fills another's.
        """
        pool = self._pools.setdefault(request.base_model, _Pool(self._weights))
        queue = pool.queues.get(request.project)
        if queue is None:
            pool.counters.arrive(request.project, pool.queues)
            queue = pool.queues[request.project] = deque()
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
        queues = self._pools[request.base_model].queues
        queues[request.project].remove(request)
        if not queues[request.project]:
            del queues[request.project]

    def assign(self, samplers: Sequence[SamplerState]) -> list[Assignment]:
        """Take requests off the queues, fairest first, until no sampler has room for any."""
        assignments: list[Assignment] = []
        for base_model, pool in self._pools.items():
            serving = [sampler for sampler in samplers if sampler.base_model == base_model]
            while pool.queues and (free := self._with_room(serving)):
                request = self._take_fairest(pool)
                sampler = min(free, key=lambda sampler: self._distance(request, sampler))
                self._start(request, sampler.address)
                assignments.append(Assignment(request, sampler.address))
        return assignments

    def progress(self, request_id: int, *, num_tokens: int, num_finished: int) -> None:
        """An assigned request has got `num_tokens` more tokens; so many completions ended."""
        running = self._running[request_id]
        running.num_tokens += num_tokens
        running.num_completions -= num_finished
        self._outstanding[running.address] -= num_finished
        # Beyond what was expected, tokens count as they come and not only when all have come.
        cost = running.request.num_prompt_tokens + running.num_tokens
        self._charge(running, max(cost, running.charged))

    def finish(self, request_id: int, *, completed: bool) -> None:
        """An assigned request has ended or was cut off; what it did not use is given back."""
        running = self._running.pop(request_id)
        request = running.request
        self._outstanding[running.address] -= running.num_completions
        if not any(other.address == running.address for other in self._running.values()):
            del self._outstanding[running.address]
        self._charge(running, request.num_prompt_tokens + running.num_tokens)
        if completed and running.num_tokens:
            length = running.num_tokens / request.num_completions
            self._pools[request.base_model].counters.observe_length(request.project, length)

    def _with_room(self, samplers: Sequence[SamplerState]) -> list[SamplerState]:
        return [
            sampler
            for sampler in samplers
            if self.outstanding(sampler.address) < self.max_running_completions
        ]

    def _take_fairest(self, pool: _Pool) -> Request:
        project = pool.counters.next_of(pool.queues)
        request = pool.queues[project].popleft()
        if not pool.queues[project]:
            del pool.queues[project]
        return request

    def _distance(self, request: Request, sampler: SamplerState) -> tuple[bool, int, str]:
        """Smallest where the policy is loaded, then where the fewest completions run."""
        missing = request.policy is not None and request.policy not in sampler.loaded
        return missing, self.outstanding(sampler.address), sampler.address

    def _start(self, request: Request, address: str) -> None:
        running = _Running(request, address, request.num_completions, charged=0.0)
        self._running[request.id] = running
        self._outstanding[address] = self.outstanding(address) + request.num_completions
        # Charged in advance, as if it were served: else whoever has the least would be given every
        # free place at once, before its first token counts.
        length = self._pools[request.base_model].counters.expected_length(request.project)
        self._charge(running, request.num_prompt_tokens + length * request.num_completions)

    def _charge(self, running: _Running, total: float) -> None:
        """Make `total` what the request has been charged."""
        counters = self._pools[running.request.base_model].counters
        counters.charge(running.request.project, total - running.charged)
        running.charged = total
