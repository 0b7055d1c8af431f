"""Who waits for one base model: classes of priority, in each a queue for each project.

The fairest project of a class is the top of a heap. An entry whose project has moved on since is
thrown away when it comes up, so each change costs a push and no search.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, defaultdict
from itertools import chain
from typing import TYPE_CHECKING

from services.coordinator.scheduler.fairness import Account, Accounts
from services.coordinator.scheduler.routing import expected_length

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from services.coordinator.scheduler.projects import Projects
    from services.coordinator.scheduler.requests import Request


class Queue:
    """Requests of one project and class: first those that had a place, then in order of arrival.

    Of those that had one, what has begun is first: a day's quota does not hold that back.
    """

    __slots__ = ("account", "anew", "fresh", "resumed")

    def __init__(self, account: Account) -> None:
        self.account = account
        self.resumed: OrderedDict[int, Request] = OrderedDict()
        self.anew: OrderedDict[int, Request] = OrderedDict()
        self.fresh: OrderedDict[int, Request] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self.resumed or self.anew or self.fresh)

    def __iter__(self) -> Iterator[Request]:
        return chain(self.resumed.values(), self.anew.values(), self.fresh.values())

    def add(self, request: Request) -> None:
        """Put it at the end of those like it."""
        self._of(request)[request.id] = request

    def remove(self, request: Request) -> None:
        """It waits no more."""
        del self._of(request)[request.id]

    def _of(self, request: Request) -> OrderedDict[int, Request]:
        if not request.resumed:
            return self.fresh
        return self.anew if request.anew else self.resumed


class Class:
    """All that wait in one class of priority."""

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.queues: dict[str, Queue] = {}
        # Level and project: it holds for each that is not parked its level now, and older ones.
        self._heap: list[tuple[float, str]] = []
        self._aside: list[Queue] = []
        # Projects of which none goes before something changes, whatever room there is.
        self._parked: set[str] = set()

    def push(self, account: Account) -> None:
        """The level of a project that waits has changed."""
        if account.project in self._parked:
            return
        heapq.heappush(self._heap, (account.level(self.priority), account.project))
        if len(self._heap) > 64 + 4 * len(self.queues):
            self._heap = [
                (queue.account.level(self.priority), project)
                for project, queue in self.queues.items()
                if project not in self._parked
            ]
            heapq.heapify(self._heap)

    def top(self) -> Queue | None:
        """The queue of the fairest project."""
        while self._heap:
            level, project = self._heap[0]
            queue = self.queues.get(project)
            if queue is not None and queue.account.level(self.priority) == level:
                return queue
            heapq.heappop(self._heap)
        return None

    def is_parked(self, project: str) -> bool:
        """Whether none of `project` goes before something changes."""
        return project in self._parked

    def may_go(self) -> bool:
        """Whether somebody waits who is not parked."""
        return len(self.queues) > len(self._parked)

    def remove(self, project: str) -> None:
        """`project` has nothing waiting here any more."""
        del self.queues[project]
        self._parked.discard(project)

    def next(self, first: Callable[[Queue], Request | None]) -> Request | None:
        """The `first` of the fairest project that has one; others are put aside till `restore`."""
        while (queue := self.top()) is not None:
            if request := first(queue):
                return request
            heapq.heappop(self._heap)
            self._aside.append(queue)
        return None

    def restore(self, stays: Callable[[Queue], bool]) -> None:
        """Whoever was put aside is there again, or `stays` so until `unpark`."""
        for queue in self._aside:
            if stays(queue):
                self._parked.add(queue.account.project)
            else:
                self.push(queue.account)
        self._aside.clear()

    def unpark(self, projects: Collection[str] | None, otherwise: float) -> None:
        """Of `projects`, or of all, something may go again.

        Each starts level with whoever is next, or `otherwise`: what it could not use is not owed.
        """
        back = self._parked if projects is None else self._parked.intersection(projects)
        for project in list(back):
            self._parked.discard(project)
            account = self.queues[project].account
            account.lift(self.priority, self.next_level(otherwise))
            self.push(account)

    def next_level(self, otherwise: float) -> float:
        """The level of whoever is next; `otherwise`: of nobody."""
        top = self.top()
        return otherwise if top is None else top.account.level(self.priority)


class Pool:
    """One base model: who waits for it, and what each project got of it."""

    def __init__(self, base_model: str, projects: Projects, prompt_token_price: float) -> None:
        self.base_model = base_model
        self.accounts = Accounts(projects)
        self.num_queued = 0
        # The highest first.
        self.classes: list[Class] = []
        # By class: requests that have a place and may be asked to give it up.
        self.num_preemptible: Counter[int] = Counter()
        # Since it was last planned whom to preempt: something came, went, or may go.
        self.stirred = True
        self._price = prompt_token_price
        # The most that anybody had when it was served.
        self._level = 0.0

    def add(self, request: Request) -> None:
        """`request` waits.

        A project that had nothing waiting in its class starts level with whoever is next there:
        what it did not use while it was away was lent to the others and is not owed to it.
        """
        self.stirred = True
        account = self.accounts.of(request.project)
        waiting = self._class_of(request.priority)
        queue = waiting.queues.get(request.project)
        if queue is None:
            account.lift(request.priority, waiting.next_level(self._level))
            queue = waiting.queues[request.project] = Queue(account)
            waiting.push(account)
        queue.add(request)
        account.num_queued += 1
        self.num_queued += 1

    def remove(self, request: Request) -> Account:
        """`request` waits no more; its account is the caller's to `rest`."""
        self.stirred = True
        waiting = self._class_of(request.priority)
        queue = waiting.queues[request.project]
        queue.remove(request)
        if not queue:
            waiting.remove(request.project)
        queue.account.num_queued -= 1
        self.num_queued -= 1
        return queue.account

    def unpark(self, projects: Collection[str] | None) -> None:
        """What held `projects` back, or all, may have changed."""
        for waiting in self.classes:
            if projects is None or not waiting.queues.keys().isdisjoint(projects):
                self.stirred = True
            waiting.unpark(projects, self._level)

    def price(self, request: Request, num_tokens: float) -> float:
        """What a request with so many drawn tokens counts.

        Its prompt is paid with its first place: nobody pays for being preempted, or for a sampler
        that was lost.
        """
        prompt = 0.0 if request.resumed else request.num_prompt_tokens * self._price
        return prompt + num_tokens

    def served(self, account: Account, priority: int) -> None:
        """It is the turn of `account`."""
        self._level = max(self._level, account.level(priority))

    def charge(self, account: Account, tokens: float) -> None:
        """Count priced tokens; fewer than 0 give back what was charged in advance."""
        account.served += tokens / account.weight
        if account.num_queued:
            for waiting in self.classes:
                if account.project in waiting.queues:
                    waiting.push(account)

    def queue_of(self, request: Request) -> Queue | None:
        """Where `request` would wait; None: its project has nothing waiting there."""
        return self._class_of(request.priority).queues.get(request.project)

    def of_project(self, project: str) -> Iterator[Request]:
        """All of a project's that wait."""
        for waiting in self.classes:
            yield from waiting.queues.get(project, ())

    def turns(
        self, may_go: Callable[[Request], bool], *, parked: bool = True
    ) -> Iterator[tuple[Request, bool]]:
        """All that wait, in the order of their turns if there were room, and whether they go.

        `may_go` is asked of each in the order of its queue. Whoever may not costs its project no
        turn. Without `parked`: only of projects of which some may go.
        """
        charged: defaultdict[str, float] = defaultdict(float)
        for waiting in self.classes:
            heap = [
                (queue.account.level(waiting.priority) + charged[project], project, iter(queue))
                for project, queue in waiting.queues.items()
                if parked or not waiting.is_parked(project)
            ]
            heapq.heapify(heap)
            while heap:
                level, project, requests = heap[0]
                request = next(requests, None)
                if request is None:
                    heapq.heappop(heap)
                    continue
                account = waiting.queues[project].account
                goes = may_go(request)
                if goes:
                    advance = self.price(request, advance_tokens(request, account))
                    level += advance / account.weight
                    charged[project] += advance / account.weight
                heapq.heapreplace(heap, (level, project, requests))
                yield request, goes

    def _class_of(self, priority: int) -> Class:
        for waiting in self.classes:
            if waiting.priority == priority:
                return waiting
        waiting = Class(priority)
        self.classes = sorted([*self.classes, waiting], key=lambda other: -other.priority)
        return waiting


def advance_tokens(request: Request, account: Account) -> float:
    """Tokens that are charged when it gets its place, as if they were drawn.

    Else whoever has the least would be given every free place before its first token counts.
    """
    return expected_length(request, account.length) * request.num_completions
