"""A trainer: passes one after the other, each with all that waits, up to a number of tokens."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.coordinator.simulation.calibration import Calibration
    from services.coordinator.simulation.clock import Clock


class ModelledTrainer:
    """Steps are computed in the order of their arrival; those that wait are fused.

    An adapter has at most one step here, so its own are in order by nature.
    """

    def __init__(self, clock: Clock, calibration: Calibration, *, speed: int = 1) -> None:
        """`speed`: machines that share the tokens of each pass, which costs nothing here."""
        self.busy: list[tuple[float, float]] = []
        self._clock = clock
        self._calibration = calibration
        self._speed = speed
        self._waiting: deque[tuple[int, Callable[[float], None]]] = deque()
        self._free_at = clock.now
        self._asked = False

    def submit(self, tokens: int, trained: Callable[[float], None]) -> None:
        """A step on so many tokens; `trained` is called at its end, with when its pass began."""
        self._waiting.append((tokens, trained))
        self._ask()

    def pause(self, seconds: float) -> None:
        """Begin nothing for so long."""
        self._free_at = max(self._free_at, self._clock.now) + seconds

    def _ask(self) -> None:
        if not self._asked and self._waiting:
            self._asked = True
            self._clock.at(self._free_at, self._begin)

    def _begin(self) -> None:
        self._asked = False
        now = self._clock.now
        if now < self._free_at:
            self._ask()
            return
        taken = [self._waiting.popleft()]
        total = taken[0][0]
        calibration = self._calibration
        while self._waiting and total + self._waiting[0][0] <= calibration.fused_tokens:
            taken.append(self._waiting.popleft())
            total += taken[-1][0]
        tokens_s = total * calibration.train_s_per_token / self._speed
        end = now + calibration.train_step_s + tokens_s
        self._free_at = end
        self.busy.append((now, end))

        def ended() -> None:
            for _, trained in taken:
                trained(now)

        self._clock.at(end, ended)
        self._ask()
