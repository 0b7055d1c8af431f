"""How long an adapter keeps its slot, from what changing it was seen to cost."""

from __future__ import annotations

_COST_SHARE = 1 / 8
"""Of a turn's slot time, what changing the adapter may cost before turns get longer."""
_MAX_QUANTA = 30
"""A turn gets so many times longer at most."""
_SMOOTHING = 0.2


class Quantum:
    """A turn is quantum_s, or longer where a change costs much beside that.

    A load stops the requests of every slot. While the last requests of a turn end, the places of
    those that have ended are empty.
    """

    def __init__(self, quantum_s: float) -> None:
        self._quantum_s = quantum_s
        self._load_s = _Mean()
        self._wasted_s = _Mean()

    @property
    def load_s(self) -> float:
        """What a load takes."""
        return self._load_s.value

    def turn_s(self, num_slots: int) -> float:
        """How long an adapter keeps its slot while others wait for one."""
        cost_s = num_slots * self._load_s.value + self._wasted_s.value
        return min(max(self._quantum_s, cost_s / _COST_SHARE), _MAX_QUANTA * self._quantum_s)

    def note_load(self, seconds: float) -> None:
        """A load took so long."""
        self._load_s.add(seconds)

    def note_end(self, seconds: float, mean_s: float) -> None:
        """The last completions of a turn took so long to end, on average `mean_s`."""
        self._wasted_s.add(seconds - mean_s)


class _Mean:
    """An exponential moving average, which begins with the first value."""

    def __init__(self) -> None:
        self.value = 0.0
        self._weight = 1.0

    def add(self, value: float) -> None:
        self.value += self._weight * (value - self.value)
        self._weight = _SMOOTHING
