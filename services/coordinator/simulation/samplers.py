"""A sampler that draws its completions side by side: the more there are, the slower is each."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from services.coordinator.scheduler import SamplerState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.coordinator.scheduler import Policy, Request
    from services.coordinator.simulation.calibration import Calibration
    from services.coordinator.simulation.clock import Clock

MAX_LOADED = 64
"""Policies kept; of more, the oldest is let go. Slots of the engine are not modelled."""


class ModelledSampler:
    """All completions under way have the same speed, so each ends at a fixed count of `_drawn`.

    A prompt stops the drawing of all while it is computed; a version that is not there is pulled
    without stopping the others.
    """

    def __init__(
        self,
        address: str,
        clock: Clock,
        calibration: Calibration,
        rates: Sequence[float],
        ended: Callable[[list[tuple[int, int]]], None],
    ) -> None:
        """`ended`: called with those that end at once: number of the request, and index in it."""
        self.address = address
        self.history: list[tuple[float, int]] = [(clock.now, 0)]
        self._clock = clock
        self._calibration = calibration
        self._rates = rates
        self._ended = ended
        self._loaded: dict[Policy, float] = {}
        self.state = SamplerState(address, "base", ())
        # Tokens that each completion would have that was there from the beginning.
        self._drawn = 0.0
        self._since = clock.now
        self._blocked_until = clock.now
        self._ends: list[tuple[float, int, int]] = []
        # By request: where it began, and its completions that have not ended with where they do.
        self._begun: dict[int, tuple[float, dict[int, float]]] = {}
        self._num_drawing = 0
        self._arming = 0

    def start(self, request: Request, lengths: dict[int, int]) -> None:
        """Draw completions of the lengths, by their index."""
        self._begun[request.id] = (-1.0, dict.fromkeys(lengths, 0.0))
        ready_s = 0.0
        if request.policy is not None:
            if request.policy not in self._loaded:
                if len(self._loaded) == MAX_LOADED:
                    del self._loaded[next(iter(self._loaded))]
                self._loaded[request.policy] = self._clock.now + self._calibration.load_s
                self.state = SamplerState(self.address, "base", frozenset(self._loaded))
            ready_s = max(0.0, self._loaded[request.policy] - self._clock.now)
        if ready_s:
            self._clock.after(ready_s, lambda: self._join(request, lengths))
        else:
            self._join(request, lengths)

    def stop(self, request_id: int) -> dict[int, int]:
        """Let go of a request; tokens that each of its completions had that have not ended."""
        self._advance()
        begun, ends = self._begun.pop(request_id)
        if begun < 0:
            return dict.fromkeys(ends, 0)
        self._num_drawing -= len(ends)
        self._arm()
        # Rounded down: a completion that is stopped has not ended.
        return {index: int(self._drawn - begun) for index in ends}

    def _join(self, request: Request, lengths: dict[int, int]) -> None:
        if request.id not in self._begun:
            return  # It was stopped while it waited for its policy.
        self._advance()
        prefill_s = request.num_prompt_tokens * self._calibration.prefill_s_per_token
        self._blocked_until = max(self._blocked_until, self._clock.now) + prefill_s
        ends = {index: self._drawn + length for index, length in lengths.items()}
        self._begun[request.id] = (self._drawn, ends)
        for index, end in ends.items():
            heapq.heappush(self._ends, (end, request.id, index))
        self._num_drawing += len(ends)
        self._arm()

    def _advance(self) -> None:
        now = self._clock.now
        seconds = now - max(self._since, min(self._blocked_until, now))
        if seconds > 0 and self._num_drawing:
            self._drawn += seconds * self._rate()
        self._since = now

    def _rate(self) -> float:
        return self._rates[min(self._num_drawing, len(self._rates) - 1)]

    def _arm(self) -> None:
        """Ask to be called when the next completion ends."""
        self._note()
        self._arming += 1
        while self._ends and not self._is_under_way(self._ends[0]):
            heapq.heappop(self._ends)
        if self._ends:
            arming = self._arming
            left_s = max(0.0, self._ends[0][0] - self._drawn) / self._rate()
            begin = max(self._clock.now, self._blocked_until)
            self._clock.at(begin + left_s, lambda: self._end(arming))

    def _is_under_way(self, end: tuple[float, int, int]) -> bool:
        drawn, request_id, index = end
        begun = self._begun.get(request_id)
        return begun is not None and begun[1].get(index) == drawn

    def _end(self, arming: int) -> None:
        if arming != self._arming:
            return
        self._advance()
        drawn = self._ends[0][0]
        self._drawn = max(self._drawn, drawn)
        over = []
        while self._ends and self._ends[0][0] <= drawn:
            end = heapq.heappop(self._ends)
            if self._is_under_way(end):
                over.append(end)
        for _, request_id, index in over:
            ends = self._begun[request_id][1]
            del ends[index]
            if not ends:
                del self._begun[request_id]
        self._num_drawing -= len(over)
        self._arm()
        self._ended([(request_id, index) for _, request_id, index in over])

    def _note(self) -> None:
        now, count = self._clock.now, self._num_drawing
        if self.history[-1][0] == now:
            self.history[-1] = now, count
        elif self.history[-1][1] != count:
            self.history.append((now, count))
