"""The samplers as they were last told of, what runs on each, and which has a place free.

A sampler with fewer than `max_running_completions` under way has a place, and takes the next
request whole: a large one is never overtaken for ever by small ones, and at most one request's
completions exceed the bound. So a group stays together, where its completions share the keys and
values of their prompt; each that ends gives up its place, and a long tail holds only its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.coordinator.scheduler.routing import (
    Line,
    Prefixes,
    cost_of_line,
    cost_of_place,
    most_saved,
    outstanding_tokens,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from services.coordinator.scheduler.fairness import Account
    from services.coordinator.scheduler.queues import Pool
    from services.coordinator.scheduler.requests import Request, SamplerState


_NOTHING = Line()


@dataclass(slots=True)
class Running:
    """A request that has a place.

    `started`: Unix seconds. `charged`: priced tokens so far. `held`: tokens in flight, as its quota
    counts them, `held_each` for each completion. `to_come`: tokens that a
    quota of a day counts before they are drawn. `outstanding`: tokens that it is expected to cost
    yet. `stopping`: it is to be preempted.
    """

    request: Request
    address: str
    pool: Pool
    account: Account
    expected_length: float
    started: float
    num_completions: int
    charged: float = 0.0
    held: int = 0
    held_each: int = 0
    to_come: int = 0
    num_tokens: int = 0
    outstanding: int = 0
    stopping: bool = False


class Places:
    """Who has a place, and where there is another."""

    def __init__(self, max_running_completions: int) -> None:
        self.bound = max_running_completions
        self.running: dict[int, Running] = {}
        # By address; a line only where something runs, prefixes only of samplers that serve.
        self._lines: dict[str, Line] = {}
        self._prefixes: dict[str, Prefixes] = {}
        self._seen: list[SamplerState] = []
        self._states: dict[str, SamplerState] = {}
        self._serving: dict[str, list[SamplerState]] = {}
        self._free: defaultdict[str, dict[str, SamplerState]] = defaultdict(dict)
        # Base models with a sampler that some job refuses.
        self._refused: set[str] = set()

    def see(self, samplers: Iterable[SamplerState]) -> bool:
        """`samplers` serve now; whether that is new. It is cheap if they are the same objects."""
        samplers = list(samplers)
        if samplers == self._seen:
            return False
        self._seen = samplers
        self._states = {sampler.address: sampler for sampler in samplers}
        self._prefixes = {
            address: self._prefixes.get(address) or Prefixes() for address in self._states
        }
        self._refused = {sampler.base_model for sampler in samplers if sampler.refused_by}
        self._serving = {}
        self._free.clear()
        for sampler in samplers:
            self._serving.setdefault(sampler.base_model, []).append(sampler)
            self._settle(sampler.address)
        return True

    def line(self, address: str) -> Line:
        """What is under way on one sampler."""
        return self._lines.get(address, _NOTHING)

    def refusing(self, base_model: str) -> bool:
        """Whether some job may not ask some of its samplers."""
        return base_model in self._refused

    def serving(self, base_model: str, job: str) -> list[SamplerState]:
        """The samplers that `job` may ask."""
        serving = self._serving.get(base_model, [])
        if base_model not in self._refused:
            return serving
        return [sampler for sampler in serving if job not in sampler.refused_by]

    def num_serving(self, base_model: str) -> int:
        """How many serve it, whoever may ask them."""
        return len(self._serving.get(base_model, []))

    def free(self, base_model: str) -> Mapping[str, SamplerState]:
        """Those with a place, by address."""
        return self._free[base_model]

    def refused(self, base_model: str) -> Collection[str]:
        """The jobs that may ask none of those with a place."""
        if base_model not in self._refused or not self._free[base_model]:
            return ()
        free = iter(self._free[base_model].values())
        return next(free).refused_by.intersection(*(sampler.refused_by for sampler in free))

    def cheapest(self, request: Request, promised: str) -> str:
        """Where a place costs `request` least, of those with one that it may ask.

        `promised`: where others were preempted for it, if they were.
        """
        free: Collection[SamplerState] = self._free[request.base_model].values()
        if request.base_model in self._refused:
            free = [sampler for sampler in free if request.job not in sampler.refused_by]
        if len(free) == 1:
            return next(iter(free)).address
        if promised and any(sampler.address == promised for sampler in free):
            return promised
        # Where it costs least, then where the fewest completions run.
        least = (math.inf, 0, "")
        saved = most_saved(request)
        for sampler in free:
            address = sampler.address
            line = self._lines.get(address, _NOTHING)
            tokens: float = cost_of_line(sampler, line)
            if tokens - saved > least[0]:
                continue
            tokens += cost_of_place(request, sampler, line, self._prefixes[address])
            if tokens <= least[0]:
                least = min(least, (tokens, line.num_completions, address))
        return least[2]

    def join(self, running: Running) -> None:
        """It has its place."""
        request = running.request
        self.running[request.id] = running
        self._prefixes[running.address].remember(request)
        line = self._lines.get(running.address)
        if line is None:
            line = self._lines[running.address] = Line()
        line.num_requests += 1
        line.num_completions += running.num_completions
        running.outstanding = self._outstanding(running)
        line.num_tokens += running.outstanding
        if request.policy:
            line.policies[request.policy] += 1
        self._settle(running.address)

    def progress(self, running: Running, *, num_tokens: int, num_finished: int) -> None:
        """It got tokens, and some of its completions ended."""
        line = self._lines[running.address]
        running.num_tokens += num_tokens
        running.num_completions -= num_finished
        outstanding = self._outstanding(running)
        line.num_tokens += outstanding - running.outstanding
        running.outstanding = outstanding
        if num_finished:
            line.num_completions -= num_finished
            self._settle(running.address)

    def leave(self, request_id: int) -> Running:
        """It gives up its place."""
        running = self.running.pop(request_id)
        line = self._lines[running.address]
        line.num_requests -= 1
        line.num_completions -= running.num_completions
        line.num_tokens -= running.outstanding
        if policy := running.request.policy:
            line.policies[policy] -= 1
            if not line.policies[policy]:
                del line.policies[policy]
        if not line.num_requests:
            del self._lines[running.address]
        self._settle(running.address)
        return running

    def _settle(self, address: str) -> None:
        sampler = self._states.get(address)
        if sampler is None:
            return
        line = self._lines.get(address)
        if not sampler.full and (line is None or line.num_completions < self.bound):
            self._free[sampler.base_model][address] = sampler
        else:
            self._free[sampler.base_model].pop(address, None)

    @staticmethod
    def _outstanding(running: Running) -> int:
        return outstanding_tokens(
            running.request, running.expected_length, running.num_tokens, running.num_completions
        )
