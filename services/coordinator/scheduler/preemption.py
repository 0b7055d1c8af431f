"""Which running requests give their places to waiting ones of a higher class.

Each request that waits is put, in the order of the turns, where there will be a place; if there is
none, where stopping requests of lower classes makes one: of the lowest class, the newest of it. In
the end those are spared without whom all would have their places too. That one which is stopped
goes before others of its project again, and may take a place that was meant for them, is not
foreseen.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from services.coordinator.scheduler.quotas import held_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.coordinator.scheduler.places import Places, Running
    from services.coordinator.scheduler.queues import Pool
    from services.coordinator.scheduler.quotas import Quotas
    from services.coordinator.scheduler.requests import Request


def preempt(pool: Pool, places: Places, quotas: Quotas, promised: dict[int, str]) -> list[Running]:
    """Who is to stop at one base model; they are taken for gone from now on.

    `promised`: by number of those that wait, where each will have its place: kept, so that it is
    not sought again.
    """
    if not pool.stirred or not pool.num_queued or not _outranks(pool):
        return []
    pool.stirred = False
    lowest = min(priority for priority, count in pool.num_preemptible.items() if count)
    preemption: _Preemption | None = None
    quota = _Quota(pool, places, quotas)
    for request, goes in pool.turns(quota.may_go, parked=False):
        if request.priority <= lowest:
            break
        if not goes:
            continue
        preemption = preemption or _Preemption(places, pool)
        if address := preemption.place(request, promised.get(request.id, "")):
            promised[request.id] = address
            quota.placed(request)
        elif not places.refusing(pool.base_model):
            break  # Nor is there one for any that comes after it.
    victims = preemption.victims() if preemption else []
    for victim in victims:
        victim.stopping = True
        pool.num_preemptible[victim.request.priority] -= 1
    return victims


class _Quota:
    """Who of those that wait may go, when others go before them."""

    def __init__(self, pool: Pool, places: Places, quotas: Quotas) -> None:
        self._pool = pool
        self._places = places
        self._quotas = quotas
        self._placed: Counter[str] = Counter()
        # Projects and classes with one that its quota holds back.
        self._held_back: set[tuple[str, int]] = set()

    def may_go(self, request: Request) -> bool:
        """Asked in the order of its queue."""
        queue = request.project, request.priority
        if queue in self._held_back:
            return False
        before = self._placed[request.project]
        goes = self._quotas.may_begin(request, self._tokens(request), before)
        if not goes and self._places.serving(self._pool.base_model, request.job):
            # When there is a place, it is not overtaken by what came later: nor may that make one.
            self._held_back.add(queue)
        return goes

    def placed(self, request: Request) -> None:
        """It goes."""
        self._placed[request.project] += self._tokens(request)

    def _tokens(self, request: Request) -> int:
        return held_tokens(request, self._pool.accounts.of(request.project).length)


def _outranks(pool: Pool) -> bool:
    """Whether somebody who may go waits in a higher class than somebody runs who may stop."""
    highest = next((waiting.priority for waiting in pool.classes if waiting.may_go()), None)
    if highest is None:
        return False
    return any(count and priority < highest for priority, count in pool.num_preemptible.items())


class _Preemption:
    """A plan for one base model. Who is stopping already is taken for gone."""

    def __init__(self, places: Places, pool: Pool) -> None:
        self._places = places
        self._bound = places.bound
        self._base_model = pool.base_model
        self._under_way: Counter[str] = Counter()
        self._placed: defaultdict[str, list[int]] = defaultdict(list)
        self._victims: defaultdict[str, list[Running]] = defaultdict(list)
        self._running: defaultdict[str, list[Running]] = defaultdict(list)
        for one in places.running.values():
            if one.pool is pool and not one.stopping:
                if one.request.preemptible:
                    self._running[one.address].append(one)
                self._under_way[one.address] += one.num_completions
        for there in self._running.values():
            there.sort(key=_least_first)

    def place(self, request: Request, promised: str) -> str:
        """Where `request` will have its place; empty: nowhere.

        `promised`: where it was to have it when this was asked before.
        """
        addresses = [
            sampler.address
            for sampler in self._places.serving(self._base_model, request.job)
            if not sampler.full
        ]
        free = [address for address in addresses if self._under_way[address] < self._bound]
        if promised in free:
            return self._put(request, promised)
        if free:
            return self._put(request, max(free, key=lambda there: self._under_way[there]))
        options = {there: self._needed(request, there) for there in addresses}
        best = min(
            (there for there in addresses if options[there]),
            key=lambda there: (_worst(options[there]), len(options[there]), there),
            default="",
        )
        if not best:
            return ""
        for victim in options[best]:
            self._running[best].remove(victim)
            self._under_way[best] -= victim.num_completions
        self._victims[best] += options[best]
        return self._put(request, best)

    def victims(self) -> list[Running]:
        """Who is to stop."""
        return [victim for there in self._victims for victim in self._spared(there)]

    def _put(self, request: Request, address: str) -> str:
        self._placed[address].append(request.num_completions)
        self._under_way[address] += request.num_completions
        return address

    def _needed(self, request: Request, address: str) -> list[Running]:
        """Who has to stop for a place there; empty: it cannot be had."""
        needed = []
        left = self._under_way[address]
        for one in self._running[address]:
            if one.request.priority >= request.priority:
                break
            needed.append(one)
            left -= one.num_completions
            if left < self._bound:
                return needed
        return []

    def _spared(self, address: str) -> list[Running]:
        """The victims without whom some would have no place."""
        needed = list(self._victims[address])
        placed = self._placed[address]
        under_way = self._under_way[address] - sum(placed)
        for one in sorted(needed, key=_least_first, reverse=True):
            left = under_way + one.num_completions
            # All but the last find it below the bound if the last one does.
            if left + sum(placed[:-1]) < self._bound:
                needed.remove(one)
                under_way = left
        return needed


def _least_first(running: Running) -> tuple[int, float, int]:
    return running.request.priority, -running.started, -running.request.id


def _worst(victims: Sequence[Running]) -> int:
    return max(victim.request.priority for victim in victims)
