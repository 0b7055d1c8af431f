"""The circuit breaker of one replica: pure, without a clock of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.reward.environments.config import BreakerConfig


class Breaker:
    """Closed while calls go well; open after some that failed in a row; then one call tries.

    Times are seconds of any one clock.
    """

    def __init__(self, config: BreakerConfig) -> None:
        self._config = config
        self._num_failures = 0
        self._last = ""
        self._trial = False
        self.open_until: float | None = None
        """None: it is closed."""

    def allows(self, now: float) -> bool:
        """Whether a call may be made."""
        return self.open_until is None or (now >= self.open_until and not self._trial)

    def begin(self) -> bool:
        """A call is made, which `allows` allowed; whether it is the one that tries."""
        self._trial = self.open_until is not None
        return self._trial

    def went_well(self) -> None:
        """A call has."""
        self._num_failures, self._trial, self.open_until = 0, False, None

    def failed(self, problem: str, now: float, *, trial: bool) -> None:
        """A call has, one that tried or another."""
        self._num_failures += 1
        self._last = problem
        self._trial = self._trial and not trial
        if trial or (self.open_until is None and self._num_failures >= self._config.failures):
            self.open_until = now + self._config.open_s

    def abandoned(self, *, trial: bool) -> None:
        """A call ended for reasons that are not the replica's: another one may try."""
        self._trial = self._trial and not trial

    @property
    def problem(self) -> str:
        """Why it is open; empty: it is not."""
        if self.open_until is None:
            return ""
        calls = "1 call" if self._num_failures == 1 else f"{self._num_failures} calls in a row"
        return f"{calls} failed there, the last: {self._last}"
