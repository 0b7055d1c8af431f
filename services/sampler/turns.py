"""Which adapters are in the engine's slots, and which requests begin: the policy, without a clock.

A request begins when its adapter is in a slot and the memory has room, and holds nothing of either
before: who waits for memory keeps no slot, who waits for a slot keeps no memory, and so there is no
deadlock. Memory goes to the oldest of those whose adapter is in a slot, and past one that is too
large for what is free to smaller ones, for a while; slots go round.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from services.sampler.quantum import Quantum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.sampler.admission import Memory, Request

MAX_LINGER_S = 0.05
"""Longest that an idle slot waits for more requests of its adapter while others wait for a slot."""
MAX_PASSED = 64
"""So many requests pass an older one that waits for memory; then all wait until it has begun."""
_MAX_LOOKED_AT = 32
"""So many of those that wait are looked at for one that fits: it is done at every change."""


class Swap(NamedTuple):
    """Work to do in the engine: unload one adapter, then load another (None: do not)."""

    out: int | None
    into: int | None


@dataclass
class _Slot:
    """An adapter in a slot, or on its way into it."""

    since: float
    loading: bool = True
    closing: bool = False
    """No request begins; when those that run have ended, the slot is another adapter's."""
    forgotten: bool = False
    users: int = 0
    completions: int = 0
    """That run."""
    served: bool = False
    """A request has begun in this turn."""
    idle_since: float = 0.0
    closed_at: float = 0.0
    closed_with: int = 0
    """Completions that ran when it was closed, …"""
    ran_on_s: float = 0.0
    """… and for how long after that, those that have ended, in all."""


class Turns:
    """The policy. `now`, in seconds, never goes back.

    While others wait for a slot, an adapter keeps its own for a turn (`quantum`); one that nobody
    uses leaves first. After its turn an adapter is behind all others that wait, and in each turn at
    least one of its requests begins: nobody starves or thrashes.
    """

    def __init__(self, memory: Memory, *, quantum_s: float) -> None:
        self._memory = memory
        self._quantum = Quantum(quantum_s)
        self._num_slots = 0
        self._num_arrived = 0
        self._lines: dict[int | None, OrderedDict[Request, None]] = {}
        self._slots: dict[int, _Slot] = {}
        # Adapters whose requests can't begin before they get a slot or another turn, in order.
        self._order: dict[int, None] = {}

    def open(self, num_slots: int) -> None:
        """The engine has so many slots."""
        self._num_slots = num_slots

    def resident(self, adapter: int) -> bool:
        """It is in a slot."""
        slot = self._slots.get(adapter)
        return slot is not None and not slot.loading and not slot.forgotten

    @property
    def contended(self) -> bool:
        """There may be work to do, now or in a while."""
        return bool(self._order) or any(slot.forgotten for slot in self._slots.values())

    def arrive(self, request: Request) -> None:
        """A request waits from now on."""
        self._num_arrived += 1
        request.place = self._num_arrived
        self._lines.setdefault(request.adapter, OrderedDict())[request] = None
        if request.adapter is not None:
            slot = self._slots.get(request.adapter)
            if slot is None or slot.closing:
                self._order.setdefault(request.adapter)

    def begin(self) -> list[Request]:
        """The requests that begin now."""
        begun: list[Request] = []
        while (request := self._next()) is not None:
            self._unline(request)
            self._memory.take(request)
            request.running = True
            begun.append(request)
            if request.adapter is not None:
                slot = self._slots[request.adapter]
                slot.users += 1
                slot.completions += request.num_completions
                slot.served = True
        return begun

    def end_one(self, request: Request, now: float) -> None:
        """One completion of a running request has ended."""
        self._memory.give_one(request)
        self._note_ended(request, 1, now)

    def end(self, request: Request, now: float) -> None:
        """A request has ended, is given up while it waits, or was over already."""
        if not request.running:
            if request in self._lines.get(request.adapter, ()):
                self._unline(request)
            return
        request.running = False
        self._note_ended(request, request.num_completions, now)
        self._memory.give(request)
        if request.adapter is None:
            return
        slot = self._slots[request.adapter]
        slot.users -= 1
        slot.idle_since = now
        if slot.closing and not slot.users:
            self._quantum.note_end(now - slot.closed_at, slot.ran_on_s / max(slot.closed_with, 1))

    def swap(self, now: float) -> Swap | None:
        """What to do in the engine now; until `loaded` or `failed` the adapter is on its way."""
        for adapter, slot in self._slots.items():
            if slot.forgotten and not slot.loading:
                del self._slots[adapter]
                return Swap(adapter, None)
        self._settle(now)
        into = next(self._outside(), None)
        out = None
        if into is None:
            return None
        if len(self._slots) >= self._num_slots:
            idle = {a: slot.idle_since for a, slot in self._slots.items() if self._free(a, now)}
            if not idle:
                return None
            out = min(idle, key=idle.__getitem__)
            del self._slots[out]
        del self._order[into]
        self._slots[into] = _Slot(since=now)
        return Swap(out, into)

    def loaded(self, adapter: int, now: float) -> list[Request]:
        """It is in its slot; who wanted no more than that is done."""
        slot = self._slots[adapter]
        self._quantum.note_load(now - slot.since)
        slot.since = slot.idle_since = now
        slot.loading = False
        done = [request for request in self._lines.get(adapter, ()) if not request.num_completions]
        for request in done:
            self._unline(request)
        return done

    def failed(self, adapter: int) -> list[Request]:
        """It cannot be loaded; those that waited for it fail."""
        del self._slots[adapter]
        return list(self._lines.pop(adapter, ()))

    def forget(self, adapter: int) -> None:
        """Nobody uses it, nor ever will: its slot is wanted back."""
        if adapter in self._slots:
            self._slots[adapter].forgotten = True

    def next_at(self, now: float) -> float | None:
        """When `swap` may have work though nothing else happens; None: never."""
        if next(self._outside(), None) is None:
            return None
        return min(
            (
                at
                for adapter, slot in self._slots.items()
                for at in [
                    self._idle_until(slot) if self._is_idle(adapter) else self._over_at(slot)
                ]
                if at > now
            ),
            default=None,
        )

    def _settle(self, now: float) -> None:
        """Close slots whose turn is over if others wait for them; open them if not."""
        wanted = len(self._order) - sum(1 for adapter in self._slots if adapter in self._order)
        closing = [adapter for adapter, slot in self._slots.items() if slot.closing]
        if not wanted:
            for adapter in closing:
                slot = self._slots[adapter]
                slot.closing = slot.served = False
                slot.since = now
                self._order.pop(adapter, None)
            return
        coming = sum(1 for adapter in self._slots if self._is_idle(adapter)) + len(closing)
        wanted -= self._num_slots - len(self._slots) + coming
        over = [
            (slot.since, adapter)
            for adapter, slot in self._slots.items()
            if self._is_open(adapter) and slot.served and self._over_at(slot) <= now
            if not self._is_idle(adapter)
        ]
        for _, adapter in sorted(over)[: max(0, wanted)]:
            slot = self._slots[adapter]
            slot.closing, slot.closed_at = True, now
            slot.closed_with, slot.ran_on_s = slot.completions, 0.0
            if adapter in self._lines:
                self._order[adapter] = None

    def _next(self) -> Request | None:
        """The oldest that may begin now."""
        lines = [
            self._lines[adapter]
            for adapter in (None, *self._slots)
            if adapter in self._lines and (adapter is None or self._is_open(adapter))
        ]
        passed: list[Request] = []
        for request in heapq.merge(*lines, key=lambda request: request.place):
            if self._memory.fits(request):
                for older in passed:
                    older.num_passed += 1
                return request
            passed.append(request)
            if request.num_passed >= MAX_PASSED or len(passed) >= _MAX_LOOKED_AT:
                break
        return None

    def _outside(self) -> Iterator[int]:
        """Those that wait for a slot, the first one first."""
        return (adapter for adapter in self._order if adapter not in self._slots)

    def _is_open(self, adapter: int) -> bool:
        slot = self._slots.get(adapter)
        return slot is not None and not (slot.loading or slot.closing or slot.forgotten)

    def _is_idle(self, adapter: int) -> bool:
        """It is in a slot, and nobody uses it or waits to."""
        slot = self._slots[adapter]
        return self._is_open(adapter) and not slot.users and adapter not in self._lines

    def _free(self, adapter: int, now: float) -> bool:
        """Its slot may become another's."""
        slot = self._slots[adapter]
        if slot.closing:
            return not slot.users
        return self._is_idle(adapter) and self._idle_until(slot) <= now

    def _over_at(self, slot: _Slot) -> float:
        return slot.since + self._quantum.turn_s(self._num_slots)

    def _idle_until(self, slot: _Slot) -> float:
        """More of its requests may come at once, as of those who ask again when they are answered.

        To wait for them for as long as a load takes costs at most twice what knowing would.
        """
        return min(self._over_at(slot), slot.idle_since + min(self._quantum.load_s, MAX_LINGER_S))

    def _note_ended(self, request: Request, num_completions: int, now: float) -> None:
        if request.adapter is not None:
            slot = self._slots[request.adapter]
            slot.completions -= num_completions
            if slot.closing:
                slot.ran_on_s += num_completions * (now - slot.closed_at)

    def _unline(self, request: Request) -> None:
        line = self._lines[request.adapter]
        del line[request]
        if not line:
            del self._lines[request.adapter]
            if request.adapter is not None:
                self._order.pop(request.adapter, None)
