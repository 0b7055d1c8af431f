"""Samples under way: who waits for a place on which sampler, and what samplers that die leave."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from services.coordinator.simulation.samplers import ModelledSampler
from services.coordinator.simulation.trace import Begun, Drawn, Marked

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.coordinator.scheduler import Request, SamplerState
    from services.coordinator.simulation.calibration import Calibration
    from services.coordinator.simulation.clock import Clock
    from services.coordinator.simulation.policies import Policy
    from services.coordinator.simulation.running_jobs import RunningModel
    from services.coordinator.simulation.trace import Trace

DAY_S = 86400
POLL_S = 0.5
"""How often the coordinator hears what samplers have loaded; what dies, it learns at once."""
MAX_ROUNDS = 100
"""Of giving out and taking back at one time: each has to end with fewer of a lower class."""


@dataclass(slots=True, eq=False)
class Sampling:
    """A group that waits for a place, or has one. `left`: tokens to draw, by completion."""

    job: RunningModel
    number: int
    request: Request
    left: dict[int, int]
    num_tokens: int
    address: str = ""


class Drawing:
    """All samplers, and all that is asked of them."""

    def __init__(
        self,
        clock: Clock,
        trace: Trace,
        calibration: Calibration,
        num_samplers: int,
        *,
        new_policy: Callable[[], Policy],
        ended: Callable[[Sampling], None],
    ) -> None:
        """`ended`: called with each group whose completions have all ended."""
        self.policy = new_policy()
        self.used: dict[tuple[str, int], int] = {}
        """Tokens by project and day."""
        self._clock = clock
        self._trace = trace
        self._calibration = calibration
        self._rates = calibration.rates()
        self._new_policy = new_policy
        self._group_ended = ended
        self.samplers = {name: self._new_sampler(name) for name in _names(num_samplers)}
        self._up = dict.fromkeys(self.samplers, True)
        self._states: list[SamplerState] = []
        self._heard_until = -math.inf
        self._sampling: dict[int, Sampling] = {}
        self._num_requests = 0
        self._num_waiting = 0

    def submit(self, sampling: Sampling) -> None:
        """Its request waits, under a number of its own."""
        self._num_requests += 1
        request = sampling.request = replace(
            sampling.request, id=self._num_requests, num_completions=len(sampling.left)
        )
        self._sampling[request.id] = sampling
        self._num_waiting += 1
        now = self._clock.now
        self._trace.happened.append(Marked(now, "waiting", request.job, request.id, request))
        self.policy.submit(request, now)

    def pump(self) -> None:
        """Give out what places there are; who is stopped for others begins again later."""
        if not self._num_waiting:
            return
        now = self._clock.now
        states = self._heard()
        for _ in range(MAX_ROUNDS):
            for assignment in self.policy.assign(states, now):
                self._begin(assignment.request, assignment.address)
            stopped = self.policy.preempt(states, now)
            if not stopped:
                return
            for request_id in stopped:
                self._stop(request_id, preempted=True)
        raise AssertionError("requests are stopped for others that do not get their places")

    def begin_anew(self) -> None:
        """The coordinator has lost what was drawn, and knows of nothing but usage."""
        for sampling in self._sampling.values():
            if sampling.address:
                self._take_back(sampling)
        self._sampling.clear()
        self._num_waiting = 0
        self.policy = self._new_policy()
        for (project, day), tokens in self.used.items():
            self.policy.restore_usage(project, day, tokens)

    def dies(self, address: str) -> None:
        """What runs there goes on with what it has drawn, elsewhere."""
        if not self._up[address]:
            return
        self._up[address] = False
        self._heard_until = -math.inf
        self._trace.happened.append(Marked(self._clock.now, "sampler_down", address))
        for request_id in [one for one, s in self._sampling.items() if s.address == address]:
            self._stop(request_id, preempted=False)
        self.pump()

    def returns(self, address: str) -> None:
        """As a new process: it has pulled nothing."""
        if self._up[address]:
            return
        history = self.samplers[address].history
        fresh = self._new_sampler(address)
        fresh.history = [*history, *fresh.history]
        self.samplers[address] = fresh
        self._up[address] = True
        self._heard_until = -math.inf
        self._trace.happened.append(Marked(self._clock.now, "sampler_up", address))
        self.pump()

    def _new_sampler(self, name: str) -> ModelledSampler:
        return ModelledSampler(
            name, self._clock, self._calibration, self._rates, self._completions_ended
        )

    def _heard(self) -> list[SamplerState]:
        # The same objects until the next poll: what is new about them costs the scheduler a look at
        # each.
        if self._clock.now >= self._heard_until:
            self._states = [one.state for name, one in self.samplers.items() if self._up[name]]
            self._heard_until = self._clock.now + POLL_S
        return self._states

    def _begin(self, request: Request, address: str) -> None:
        sampling = self._sampling[request.id]
        sampling.address = address
        self._num_waiting -= 1
        self._trace.happened.append(Begun(self._clock.now, request, address))
        if not request.resumed:
            self._count(request, request.num_prompt_tokens)
        self.samplers[address].start(request, sampling.left)

    def _completions_ended(self, ended: list[tuple[int, int]]) -> None:
        for request_id, index in ended:
            self._completion_ended(request_id, index)
        self.pump()

    def _completion_ended(self, request_id: int, index: int) -> None:
        sampling = self._sampling[request_id]
        length = sampling.left.pop(index)
        over = not sampling.left
        now, request = self._clock.now, sampling.request
        self._trace.happened.append(Drawn(now, request, length, 1, over))
        self._count(request, length)
        self.policy.progress(request_id, num_tokens=length, num_finished=1)
        if over:
            del self._sampling[request_id]
            self.policy.finish(request_id, completed=True, now=now)
            self._group_ended(sampling)

    def _stop(self, request_id: int, *, preempted: bool) -> None:
        """It loses its place and goes on with what it has drawn, on another."""
        sampling = self._sampling.pop(request_id)
        address = sampling.address
        drawn = self._take_back(sampling)
        for index, tokens in drawn.items():
            sampling.left[index] = max(1, sampling.left[index] - tokens)
        self.policy.progress(request_id, num_tokens=sum(drawn.values()), num_finished=0)
        now = self._clock.now
        self.policy.finish(request_id, completed=False, now=now, preempted=preempted)
        sampling.address = ""
        sampling.request = replace(
            sampling.request, resumed=True, avoid="" if preempted else address
        )
        self.submit(sampling)

    def _take_back(self, sampling: Sampling) -> dict[int, int]:
        """Off its sampler; what each of its completions had."""
        request = sampling.request
        drawn = self.samplers[sampling.address].stop(request.id)
        total = sum(drawn.values())
        self._trace.happened.append(Drawn(self._clock.now, request, total, 0, left=True))
        self._count(request, total)
        return drawn

    def _count(self, request: Request, tokens: int) -> None:
        key = request.project, int(self._clock.now // DAY_S)
        self.used[key] = self.used.get(key, 0) + tokens


def _names(count: int) -> list[str]:
    return [f"s{number}" for number in range(count)]
