"""Which adapters are in the engine's slots, and which requests begin: the policy, without a clock.

A request begins when its adapter is in a slot and the memory has room, and holds nothing of either
before: who waits for memory keeps no slot, who waits for a slot keeps no memory, and so there is no
deadlock. Of those whose adapter is in a slot the next is one of whichever adapter runs least, and
of these the oldest; past one that is too large for what is free go smaller ones, for a while.
Slots go round.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

from services.sampler.quantum import Quantum
from services.sampler.turn_slot import Slot, Swap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from services.sampler.admission import Memory, Request

MAX_LINGER_S = 0.05
"""Longest that an idle slot waits for more requests of its adapter while others wait for a slot."""
PATIENCE = 1 / 4
"""Of a turn, that an adapter waits for a slot which comes free by itself before a turn ends for it:
versions that come one after the other, each for a few tokens, need no more."""
MAX_PASSED = 64
"""So many requests pass an older one that waits for memory; then all wait until it has begun."""
_MAX_LOOKED_AT = 32
"""So many of those that wait are looked at for one that fits: it is done at every change."""


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
        self._slots: dict[int, Slot] = {}
        # Completions that run, by adapter.
        self._running: Counter[int | None] = Counter()
        # Adapters whose requests can't begin before they get a slot or another turn, in order; and
        # since when `swap` has known of them.
        self._order: dict[int, float | None] = {}

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
                self._order.setdefault(request.adapter, None)

    def begin(self) -> list[Request]:
        """The requests that begin now."""
        begun: list[Request] = []
        while (request := self._next()) is not None:
            self._unline(request)
            self._memory.take(request)
            request.running = True
            self._running[request.adapter] += request.num_completions
            begun.append(request)
            if request.adapter is not None:
                slot = self._slots[request.adapter]
                slot.users += 1
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
        for adapter, since in self._order.items():
            self._order[adapter] = now if since is None else since
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
        self._slots[into] = Slot(since=now, policy=self._policy_of(into))
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
        patient_until = [self._patient_until(adapter) for adapter in self._outside()]
        if not patient_until:
            return None
        times = [
            self._idle_until(slot) if self._is_idle(adapter) else self._over_at(slot)
            for adapter, slot in self._slots.items()
        ]
        return min((at for at in (*times, *patient_until) if at > now), default=None)

    def _settle(self, now: float) -> None:
        """Close slots whose turn is over if others wait for them; open them if not.

        One more version of a policy that has a slot waits for that policy's slots alone: however
        many versions there are of one, the others' batch stays as it is.
        """
        taken = {slot.policy for slot in self._slots.values()}
        waiting = (each for each in self._outside() if self._patient_until(each) <= now)
        patient = Counter(self._policy_of(adapter) for adapter in waiting)
        more = {policy: number for policy, number in patient.items() if policy in taken}
        wanted = patient.total() - sum(more.values())
        for adapter, slot in self._slots.items():
            if slot.closing and not wanted and slot.policy not in more:
                slot.closing = slot.served = False
                slot.since = now
                self._order.pop(adapter, None)
        for policy, number in more.items():
            own = {each: slot for each, slot in self._slots.items() if slot.policy == policy}
            self._close(own, number, now)
        if wanted:
            self._close(self._slots, wanted - (self._num_slots - len(self._slots)), now)

    def _close(self, slots: Mapping[int, Slot], wanted: int, now: float) -> None:
        """Have `wanted` of the slots come free, those whose turn has been over longest first."""
        coming = sum(1 for adapter, slot in slots.items() if slot.closing or self._is_idle(adapter))
        over = [
            (slot.since, adapter)
            for adapter, slot in slots.items()
            if self._is_open(adapter) and slot.served and self._over_at(slot) <= now
            if not self._is_idle(adapter)
        ]
        for _, adapter in sorted(over)[: max(0, wanted - coming)]:
            slot = self._slots[adapter]
            slot.closing, slot.closed_at = True, now
            slot.closed_with, slot.ran_on_s = self._running[adapter], 0.0
            if adapter in self._lines:
                self._order[adapter] = now

    def _next(self) -> Request | None:
        """The one that begins next, if one may now."""
        lines = [
            self._lines[adapter]
            for adapter in (None, *self._slots)
            if adapter in self._lines and (adapter is None or self._is_open(adapter))
        ]
        running = self._running
        passed: list[Request] = []
        for request in heapq.merge(*lines, key=lambda each: (running[each.adapter], each.place)):
            if self._memory.fits(request, first=not running[request.adapter]):
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

    def _policy_of(self, outside: int) -> str:
        return next(iter(self._lines[outside])).policy

    def _patient_until(self, adapter: int) -> float:
        since = self._order[adapter]
        assert since is not None  # noqa: S101 - `swap` sets it before it asks
        return since + PATIENCE * self._quantum.turn_s(self._num_slots)

    def _over_at(self, slot: Slot) -> float:
        return slot.since + self._quantum.turn_s(self._num_slots)

    def _idle_until(self, slot: Slot) -> float:
        """More of its requests may come at once, as of those who ask again when they are answered.

        To wait for them for as long as a load takes costs at most twice what knowing would. Where
        another version of its policy waits, they are of that.
        """
        if any(self._policy_of(outside) == slot.policy for outside in self._outside()):
            return slot.idle_since
        return min(self._over_at(slot), slot.idle_since + min(self._quantum.load_s, MAX_LINGER_S))

    def _note_ended(self, request: Request, num_completions: int, now: float) -> None:
        self._running[request.adapter] -= num_completions
        if not self._running[request.adapter]:
            del self._running[request.adapter]
        if request.adapter is not None:
            slot = self._slots[request.adapter]
            if slot.closing:
                slot.ran_on_s += num_completions * (now - slot.closed_at)

    def _unline(self, request: Request) -> None:
        line = self._lines[request.adapter]
        del line[request]
        if not line:
            del self._lines[request.adapter]
            if request.adapter is not None:
                self._order.pop(request.adapter, None)
