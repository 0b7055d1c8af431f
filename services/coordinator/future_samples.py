"""Futures of sampling: in memory alone, as what they draw can be drawn again."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rollmesh.errors import InternalError, MeshError, NotFound, Overloaded, Unavailable
from services.coordinator.future_lines import Lines
from services.coordinator.future_work import FutureState
from services.coordinator.store import future_taken, too_many_futures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rollmesh import types
    from services.coordinator.future_work import Waits, Work, Works
    from services.coordinator.store import Changes

MAX_DONE = 1000
"""Told of at once."""
OVERHEAD_BYTES = 1024
"""What one takes besides its request or result, names and all, roughly."""
LOOK_EVERY_S = 60.0
FRESH_S = 30.0
"""A result that nobody has read and that is no older makes no room for requests: whoever waits for
it would draw again, and never come to an end."""

log = logging.getLogger(__name__)


class Cancelled(MeshError):
    """Somebody stopped a future."""

    status, reason = "CANCELLED", "CANCELLED"


@dataclass(frozen=True, slots=True)
class SampleBounds:
    """Settings of CoordinatorConfig: max_futures, and those of sampling.

    `max_begun`: of a project, how many are drawn at once or wait in the scheduler; the others are
    in line. So none is refused by a full queue of the scheduler, to try again and again.
    """

    max_begun: int
    max_of_project: int
    max_of_all: int
    project_bytes: int
    all_bytes: int
    retention_s: float


@dataclass(slots=True, eq=False)
class _Sample:
    name: str
    project: str
    group: str
    digest: str
    create_time: float
    size: int
    task: asyncio.Task[None] | None = None
    # Under which the scheduler has it.
    subject: str = ""
    result: bytes | None = None
    was_read: bool = False
    failed: bool = False
    done_time: float = 0.0
    # Of the order in which they came to be done; it grows across lives of the coordinator too.
    cursor: int = 0


class Samples:
    """Draws what is asked for, and keeps it for a while.

    Args:
        works: does the work.
        why: of project and subject, for what it waits in the scheduler; None: it does not.
        changes: hears the names of those that are done, and `topic_of` their groups.
        waits: where it stands why one waits otherwise.
        bounds: settings.
        clock: Unix seconds.
    """

    def __init__(
        self,
        works: Works,
        why: Callable[[str, str], types.Waiting | None],
        *,
        changes: Changes,
        waits: Waits,
        bounds: SampleBounds,
        clock: Callable[[], float],
    ) -> None:
        self._works = works
        self._why = why
        self._changes = changes
        self._waits = waits
        self._bounds = bounds
        self._clock = clock
        self._tasks: asyncio.TaskGroup | None = None
        self._samples: dict[str, _Sample] = {}
        self._num_unfinished: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._unfinished_bytes: Counter[str] = Counter()
        self._lines = Lines(bounds.max_begun)
        self._cursor = 0
        # By cursor, the oldest first: of all, of projects, and of groups.
        self._done: dict[int, _Sample] = {}
        self._done_of: defaultdict[str, dict[int, _Sample]] = defaultdict(dict)
        self._groups: defaultdict[tuple[str, str], dict[int, _Sample]] = defaultdict(dict)

    async def run(self) -> None:
        """Draw until cancelled, which ends every draw."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            try:
                while True:
                    self._drop_old()
                    await asyncio.sleep(LOOK_EVERY_S)
            finally:
                self._tasks = None

    def create(self, name: str, project: str, group: str, work: Work) -> None:
        """Begin to draw, unless that is done or under way; errors as FutureService says."""
        self._drop_old()
        digest = hashlib.sha256(work.body).hexdigest()
        if name in self._samples:
            found = self._samples[name]
            if (found.digest, found.group) != (digest, group):
                raise future_taken(name)
            return
        if self._tasks is None:
            raise Unavailable("nothing is drawn before this coordinator leads, and after that")
        sample = _Sample(
            name, project, group, digest, self._clock(), len(work.body) + OVERHEAD_BYTES
        )
        self._check_bounds(sample)
        self._samples[name] = sample
        self._num_unfinished[project] += 1
        self._bytes[project] += sample.size
        self._unfinished_bytes[project] += sample.size
        sample.task = self._tasks.create_task(self._draw(sample, work.body))

    def has(self, name: str) -> bool:
        """Whether it is there."""
        self._drop_old()
        return name in self._samples

    def state(self, name: str) -> FutureState:
        """As it is now. NotFound: it is not there, or no more."""
        if not self.has(name):
            raise NotFound(f"there is no {name}", resource=name)
        sample = self._samples[name]
        waiting = None
        if sample.result is None:
            waiting = self._waits.of(name)
            if waiting is None:
                waiting = self._lines.waiting(sample.project, name, since=sample.create_time)
            if waiting is None and sample.subject:
                waiting = self._why(sample.project, sample.subject)
        else:
            sample.was_read = True
        return FutureState(name, sample.create_time, sample.result, waiting)

    def done_since(self, project: str, group: str, after: int) -> list[tuple[int, str, bool]]:
        """Cursor, name and whether it failed, of those of a group that are done since `after`."""
        self._drop_old()
        done = self._groups.get((project, group), {})
        newest = itertools.takewhile(lambda cursor: cursor > after, reversed(done))
        cursors = list(newest)[: -MAX_DONE - 1 : -1]
        return [(cursor, done[cursor].name, done[cursor].failed) for cursor in cursors]

    def cancel(self, name: str) -> None:
        """Stop one; one that is done stays as it is."""
        sample = self._samples[name]
        if sample.result is not None:
            return
        assert sample.task is not None  # noqa: S101 - each has one as soon as it is there
        sample.task.cancel()
        self._end(sample, self._works.failure(Cancelled(f"{name} was cancelled")), failed=True)

    async def _draw(self, sample: _Sample, body: bytes) -> None:
        failed = True
        try:
            draw = partial(self._works.sample, sample.name, body, partial(_note, sample))
            async with self._lines.turn(sample.project, sample.name):
                result = await self._waits.out(sample.name, draw)
            failed = False
        except MeshError as error:
            result = self._works.failure(error)
        except Exception:
            log.exception("%s failed by a bug", sample.name)
            result = self._works.failure(InternalError("sampling failed by a bug; see the log"))
        if sample.result is None:
            self._end(sample, result, failed=failed)

    def _end(self, sample: _Sample, result: bytes, *, failed: bool) -> None:
        now = self._clock()
        self._cursor = max(self._cursor + 1, int(now * 1e6))
        sample.result, sample.failed = result, failed
        sample.done_time, sample.cursor = now, self._cursor
        self._num_unfinished -= Counter([sample.project])
        self._unfinished_bytes -= Counter({sample.project: sample.size})
        size = len(result) + OVERHEAD_BYTES
        self._bytes[sample.project] += size - sample.size
        sample.size = size
        for done in self._lists(sample):
            done[sample.cursor] = sample
        self._make_room(sample.project)
        self._changes.wake(sample.name, topic_of(sample.project, sample.group))

    def _check_bounds(self, sample: _Sample) -> None:
        project, bounds = sample.project, self._bounds
        count = self._num_unfinished[project]
        if count >= bounds.max_of_project:
            raise too_many_futures(project, count, bounds.max_of_project)
        if self._num_unfinished.total() >= bounds.max_of_all:
            raise Overloaded(
                f"{bounds.max_of_all} futures of sampling are not done, which is "
                "max_sampling_futures",
                allowed=bounds.max_of_all,
            )
        if not self._has_room(project, sample.size):
            raise Overloaded(
                "futures of sampling that are not done take half of max_sampling_bytes or, of this "
                "project, of max_project_sampling_bytes, or results that nobody has read yet take "
                "the rest",
                resource=f"projects/{project}",
                value=self._bytes[project],
                allowed=bounds.project_bytes,
            )

    def _has_room(self, project: str, size: int) -> bool:
        """Whether a request of so many bytes has room, once results that may go are gone.

        All requests take half of the bytes at most: the other half is for results, any of which is
        smaller, so that one that has just come never goes for want of room.
        """
        bounds, unfinished = self._bounds, self._unfinished_bytes
        if (
            unfinished[project] + size > bounds.project_bytes // 2
            or unfinished.total() + size > bounds.all_bytes // 2
        ):
            return False
        fresh = self._clock() - FRESH_S
        for sample in self._in_the_way(project, size):
            if not sample.was_read and sample.done_time >= fresh:
                return False
            self._drop(sample)
        return True

    def _make_room(self, project: str) -> None:
        """Drop the oldest results until the bounds hold."""
        for sample in self._in_the_way(project, 0):
            self._drop(sample)

    def _in_the_way(self, project: str, size: int) -> Iterator[_Sample]:
        """Results to drop, the oldest first, until there is room for so many bytes more."""
        bounds = self._bounds
        while self._bytes[project] + size > bounds.project_bytes and (
            done := self._done_of.get(project)
        ):
            yield next(iter(done.values()))
        while self._bytes.total() + size > bounds.all_bytes and self._done:
            yield next(iter(self._done.values()))

    def _drop_old(self) -> None:
        before = self._clock() - self._bounds.retention_s
        while self._done and (oldest := next(iter(self._done.values()))).done_time < before:
            self._drop(oldest)

    def _drop(self, sample: _Sample) -> None:
        del self._samples[sample.name]
        for done in self._lists(sample):
            del done[sample.cursor]
        if not self._groups[sample.project, sample.group]:
            del self._groups[sample.project, sample.group]
        if not self._done_of[sample.project]:
            del self._done_of[sample.project]
        self._bytes -= Counter({sample.project: sample.size})

    def _lists(self, sample: _Sample) -> tuple[dict[int, _Sample], ...]:
        key = sample.project, sample.group
        return self._done, self._done_of[sample.project], self._groups[key]


def topic_of(project: str, group: str) -> str:
    """What `changes` hears when one of a group is done."""
    return f"projects/{project} {group}"


def _note(sample: _Sample, subject: str) -> None:
    sample.subject = subject
