"""The tasks of an environment: by split and place, by id, in pages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from rollmesh import chat
from rollmesh.errors import InvalidRequest, NotFound
from rollmesh.names import ID_PATTERN

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_PAGE_TASKS = 1_000
"""Most tasks of a page."""
MAX_PAGE_BYTES = 1024 * 1024
"""A page goes no further once it has as much text: gRPC's clients take 4 MiB unless told more."""

_NAME = re.compile(ID_PATTERN)
_NUMBERED = re.compile(rf"({ID_PATTERN})-(0|[1-9][0-9]{{0,17}})")
_TOKEN = re.compile(rf"({ID_PATTERN}):([1-9][0-9]{{0,17}})")


def task_of(text: str, /, **fields: str) -> chat.Task:
    """A task in which the user says `text`; `fields` are for whoever scores it."""
    return chat.Task("", messages=(chat.Message("user", text),), fields=fields)


class Generated(Sequence[chat.Task]):
    """`count` tasks of which each is made when it is asked for.

    `make` gets a place in [0, count) and gives text or a task without an id, for the same place
    always the same. It is called on the event loop, so it should take microseconds.
    """

    def __init__(self, count: int, make: Callable[[int], str | chat.Task]) -> None:
        self._count = count
        self._make = make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> chat.Task: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[chat.Task]: ...
    def __getitem__(self, index: int | slice) -> chat.Task | Sequence[chat.Task]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        made = self._make(index)
        task = task_of(made) if isinstance(made, str) else made
        if task.id:
            raise ValueError(f"task {index} was made with an id, {task.id!r}; it gets one here")
        return task


class Tasks:
    """The tasks of all splits. One without an id gets its split's name and its place as one.

    Raises:
        ValueError: what the author gave is wrong: a split's name, an id, or an id twice.
    """

    def __init__(self, splits: Mapping[str, Sequence[str | chat.Task]]) -> None:
        if not splits:
            raise ValueError("an environment has at least one split of tasks")
        self._splits = dict(splits)
        self._places: dict[str, tuple[str, int]] = {}
        for name, tasks in self._splits.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a split: it is to fit {ID_PATTERN}")
            if isinstance(tasks, str) or not tasks:
                raise ValueError(f"split {name!r} is to be a sequence of at least one task")
            if not isinstance(tasks, Generated):
                self._index(name, tasks)
        for own in self._places:
            if self._numbered(own) is not None:
                raise ValueError(f"the id {own!r} is that of another task by its place")

    def _index(self, split: str, tasks: Sequence[str | chat.Task]) -> None:
        for place, task in enumerate(tasks):
            own = "" if isinstance(task, str) else task.id
            if len(own) > chat.MAX_TASK_ID:
                raise ValueError(f"an id has {len(own)} characters, more than {chat.MAX_TASK_ID}")
            if own in self._places:
                raise ValueError(f"two tasks have the id {own!r}")
            if own:
                self._places[own] = (split, place)

    @property
    def splits(self) -> tuple[chat.Split, ...]:
        """The splits, in their order."""
        return tuple(chat.Split(name, len(tasks)) for name, tasks in self._splits.items())

    def page(self, split: str, size: int, token: str) -> tuple[list[chat.Task], str]:
        """Tasks of `split`, at most `size` (0: as fits), and the token of the next page.

        Raises:
            InvalidRequest: there is no such split, a size below 0, or a token of another split.
        """
        if split not in self._splits:
            allowed = ", ".join(self._splits)
            raise InvalidRequest(
                f"split: there is no {split[:100]!r}, there is {allowed}",
                field="split",
                value=split[:100],
                allowed=allowed,
            )
        if size < 0:
            raise InvalidRequest(f"page_size: {size} is below 0", field="page_size", value=size)
        start = self._start(split, token)
        stop = min(len(self._splits[split]), start + min(size or MAX_PAGE_TASKS, MAX_PAGE_TASKS))
        page: list[chat.Task] = []
        num_bytes = 0
        for place in range(start, stop):
            if num_bytes >= MAX_PAGE_BYTES:
                break
            page.append(self._task(split, place))
            num_bytes += _bytes(page[-1])
        following = start + len(page)
        return page, f"{split}:{following}" if following < len(self._splits[split]) else ""

    def get(self, task_id: str) -> chat.Task:
        """The task with this id.

        Raises:
            NotFound: there is none.
        """
        found = self._places.get(task_id) or self._numbered(task_id)
        if found is None:
            raise NotFound(f"there is no task {task_id[:100]!r}", task_id=task_id[:100])
        return self._task(*found)

    def _start(self, split: str, token: str) -> int:
        if not token:
            return 0
        match = _TOKEN.fullmatch(token)
        if match and match[1] == split and int(match[2]) < len(self._splits[split]):
            return int(match[2])
        raise InvalidRequest(
            f"page_token: {token[:100]!r} is none that was given for split {split!r}",
            field="page_token",
            value=token[:100],
        )

    def _numbered(self, task_id: str) -> tuple[str, int] | None:
        """Where the task without an id of its own is that is called so; None: nowhere."""
        match = _NUMBERED.fullmatch(task_id)
        if match is None or match[1] not in self._splits:
            return None
        split, place = match[1], int(match[2])
        tasks = self._splits[split]
        if place >= len(tasks):
            return None
        # A task that has been made here has no id of its own.
        task = "" if isinstance(tasks, Generated) else tasks[place]
        return (split, place) if isinstance(task, str) or not task.id else None

    def _task(self, split: str, place: int) -> chat.Task:
        found = self._splits[split][place]
        task = task_of(found) if isinstance(found, str) else found
        return chat.Task(task.id or f"{split}-{place}", split, task.messages, task.fields)


def _bytes(task: chat.Task) -> int:
    texts = [message.content for message in task.messages]
    return sum(len(text.encode()) for text in [*texts, *task.fields.keys(), *task.fields.values()])
