"""Who may begin, by what it may come to need; and queues that have an end.

Whatever a request reserves it reserves as a whole when it begins: nobody holds a part of something
while waiting for the rest of it.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from rollmesh.errors import Overloaded
from rollmesh.telemetry import record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_RECENT = 32
"""So many of the last ones that left the queue tell how fast it moves."""
_MIN_RETRY_S, _MAX_RETRY_S = 0.05, 30.0


class Need(NamedTuple):
    """What a request may come to need, in tokens whose keys and values are kept.

    `shared_tokens`, the prompt, counts once though vLLM admits completions one by one: it lists a
    prompt's blocks as cached when it hands them out, so that a completion which is admitted in the
    same step finds them.
    """

    shared_tokens: int
    each_tokens: int
    num_completions: int


@dataclass(eq=False)
class Request:
    """A request as admission sees it; 0 completions: its adapter shall get into a slot once.

    Attributes:
        adapter: number of the LoadedAdapter; None: the base model.
        policy: which it is a version of.
        shared_tokens, each_tokens: as Need.
        num_completions: that have not ended yet.
        place: in the order of arrival.
        num_passed: younger ones that began before it because it was too large.
        running: it has begun and not ended.
        reserved_tokens: it has of the memory.
    """

    adapter: int | None
    shared_tokens: int = 0
    each_tokens: int = 0
    num_completions: int = 0
    policy: str = ""
    place: int = 0
    num_passed: int = 0
    running: bool = False
    reserved_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values it may still come to need at once."""
        return self.shared_tokens + self.num_completions * self.each_tokens


class Memory:
    """The engine's key-value memory, and its batch.

    A request that may need more than all of it reserves all of it: within that the engine puts
    completions off, and others begin beside it as far as the memory is overcommitted.

    Args:
        overcommit: so many times the memory may be reserved.
        max_completions: a request begins only while fewer run: what waits in the engine's own queue
            could not be put in order here any more. One is let in beside them whose adapter runs
            none: for a few tokens of a new version nobody waits until others' completions end.
    """

    def __init__(self, *, overcommit: float, max_completions: int) -> None:
        self._overcommit = overcommit
        self._max_completions = max_completions
        self._kv_tokens: float = math.inf
        self.reserved_tokens = 0
        self._num_completions = 0

    def open(self, kv_tokens: int) -> None:
        """The memory is so large; 0: not bounded."""
        self._kv_tokens = kv_tokens or math.inf

    def fits(self, request: Request, *, first: bool) -> bool:
        """It may begin now; `first`: as the only one of its adapter.

        With nothing else running, everyone may.
        """
        if self._num_completions >= self._max_completions and not first:
            return False
        return self.reserved_tokens + self._share(request) <= self._overcommit * self._kv_tokens

    def take(self, request: Request) -> None:
        """Reserve all that it may come to need."""
        self._num_completions += request.num_completions
        self._reserve(request, self._share(request))

    def give_one(self, request: Request) -> None:
        """One of its completions has ended."""
        request.num_completions -= 1
        self._num_completions -= 1
        self._reserve(request, self._share(request))

    def give(self, request: Request) -> None:
        """It has ended, in whatever way."""
        self._num_completions -= request.num_completions
        self._reserve(request, 0)

    def _share(self, request: Request) -> int:
        return int(min(request.num_tokens, self._kv_tokens))

    def _reserve(self, request: Request, num_tokens: int) -> None:
        self.reserved_tokens += num_tokens - request.reserved_tokens
        request.reserved_tokens = num_tokens
        record("rollmesh.sampler.kv_reserved", self.reserved_tokens)


class Queue:
    """Those that wait for one thing. A project has at most half of the places, and at least one.

    Args:
        what: they are called in errors.
        clock: seconds.
    """

    def __init__(self, max_queued: int, what: str, clock: Callable[[], float]) -> None:
        self._max_queued = max_queued
        self._what = what
        self._clock = clock
        self._begun_at: deque[float] = deque(maxlen=_RECENT)
        self._queued: Counter[str] = Counter()

    @property
    def num_queued(self) -> int:
        """Those of all projects."""
        return self._queued.total()

    @contextlib.contextmanager
    def waiting(self, project: str) -> Iterator[None]:
        """Wait while the block runs.

        Raises:
            Overloaded: as many as may be wait, of all or of this project; says when a place is
                likely to be free.
        """
        share = (self._max_queued + 1) // 2
        if self._queued[project] >= share:
            whose = f"{self._what} of project {project}"
            raise self._full(f"{share} {whose} wait, as many as may be", project, share)
        if self.num_queued >= self._max_queued:
            all_of_them = f"{self._max_queued} {self._what} wait, as many as may be"
            mine = f"{self._queued[project]} of project {project}"
            raise self._full(f"{all_of_them}, {mine}", project, self._max_queued)
        self._add(project, 1)
        try:
            yield
            self._begun_at.append(self._clock())
        finally:
            self._add(project, -1)

    def _add(self, project: str, number: int) -> None:
        self._queued[project] += number
        if not self._queued[project]:
            del self._queued[project]
        record("rollmesh.sampler.queued", self.num_queued, what=self._what)

    def _full(self, message: str, project: str, limit: int) -> Overloaded:
        error = Overloaded(message, resource=self._what, project=project, limit=limit)
        error.retry_after_s = self._place_free_s()
        return error

    def _place_free_s(self) -> float:
        """Mean time between two that left, of which the time since the last one is a part."""
        if not self._begun_at:
            return Overloaded.retry_after_s
        elapsed = self._clock() - self._begun_at[0]
        return min(max(elapsed / len(self._begun_at), _MIN_RETRY_S), _MAX_RETRY_S)
