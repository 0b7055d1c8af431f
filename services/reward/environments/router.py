"""Every environment that the reward service knows, by name."""

from __future__ import annotations

import asyncio
import difflib
from typing import TYPE_CHECKING, Protocol

from rollmesh import chat
from rollmesh.errors import InvalidRequest, MeshError, NotFound, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.reward.environments.ports import Requests, Tell

END_MARGIN_S = 0.5
"""Before the server would cut off what is still under way, to end it with a word."""


class Served(Protocol):
    """An environment: `RemoteEnvironment` and `ServedHere` say what their methods do."""

    name: str

    async def run(self) -> None:
        """Keep up to date how it is."""
        ...

    def close(self, error: Callable[[], MeshError]) -> None:
        """Begin nothing more."""
        ...

    def break_off(self, error: Callable[[], MeshError]) -> None:
        """End what is under way."""
        ...

    def status(self) -> chat.EnvironmentStatus:
        """How it is."""
        ...

    def describe(self) -> chat.EnvironmentInfo | None:
        """What it is."""
        ...

    async def list_tasks(
        self, split: str, page_size: int, page_token: str
    ) -> tuple[list[chat.Task], str]:
        """A page of tasks."""
        ...

    async def get_task(self, task_id: str) -> chat.Task:
        """One task."""
        ...

    async def score(self, items: Sequence[chat.Answered]) -> list[chat.Scored]:
        """What answers are worth."""
        ...

    async def play(self, start: chat.Start, requests: Requests, tell: Tell) -> None:
        """An episode."""
        ...


class Router:
    """Finds the environment that a call names.

    Its methods raise what that environment raises, NotFound where there is none of the name,
    InvalidRequest for what can never work, and Unavailable when the service is ending.
    """

    def __init__(self, environments: Sequence[Served]) -> None:
        self._environments = {each.name: each for each in environments}

    async def run(self) -> None:
        """Keep up to date how they are, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for environment in self._environments.values():
                tasks.create_task(environment.run())

    def end(self, within_s: float) -> None:
        """Begin nothing more, and end what is under way shortly before `within_s` are over."""
        for environment in self._environments.values():
            environment.close(_ending)
            asyncio.get_running_loop().call_later(
                max(within_s - END_MARGIN_S, 0.0), environment.break_off, _ending
            )

    def list_environments(self) -> list[chat.EnvironmentStatus]:
        """How they are, by name."""
        return [self._environments[name].status() for name in sorted(self._environments)]

    def describe(self) -> list[chat.EnvironmentInfo]:
        """What those are that take work, by name."""
        infos = [self._environments[name].describe() for name in sorted(self._environments)]
        return [info for info in infos if info is not None]

    async def list_tasks(
        self, name: str, split: str, *, page_size: int, page_token: str
    ) -> tuple[list[chat.Task], str]:
        """Tasks of a split, and the token of the next page."""
        if page_size < 0:
            raise _invalid("page_size", page_size, "0 or more")
        return await self._find(name).list_tasks(split, page_size, page_token)

    async def get_task(self, name: str, task_id: str) -> chat.Task:
        """One task."""
        return await self._find(name).get_task(_checked_id(task_id))

    async def score(self, name: str, items: Sequence[chat.Answered]) -> list[chat.Scored]:
        """What answers are worth, in order."""
        if not items:
            raise _invalid("items", "none", "at least one")
        return await self._find(name).score(items)

    async def play(self, requests: Requests, tell: Tell) -> None:
        """The episode that the first of `requests` starts, to its end."""
        start = await anext(requests, None)
        if not isinstance(start, chat.Start):
            raise _invalid("request", "an action" if start else "nothing", "start, at first")
        if start.seed < 0:
            raise _invalid("start.seed", start.seed, "0 or more")
        _checked_id(start.task_id, field="start.task_id")
        await self._find(start.environment).play(start, requests, tell)

    def _find(self, name: str) -> Served:
        known = sorted(self._environments)
        if not name and len(known) == 1:
            (name,) = known
        if name in self._environments:
            return self._environments[name]
        allowed = ", ".join(known) or "none"
        if not name:
            raise _invalid("environment", "", f"one of {allowed}")
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise NotFound(
            f"there is no environment {name[:63]!r}; {hint}There are: {allowed}",
            field="environment",
            value=name[:63],
            allowed=allowed,
        )


def _checked_id(task_id: str, *, field: str = "task_id") -> str:
    """`task_id`, if a task may have it: what else it may be goes to no environment."""
    if not 1 <= len(task_id) <= chat.MAX_TASK_ID:
        raise NotFound(
            f"{field}: there is no task {task_id[:63]!r}: ids have 1 to {chat.MAX_TASK_ID} "
            "characters",
            field=field,
            value=task_id[:63],
        )
    return task_id


def _invalid(field: str, value: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field}: {value!r} is not allowed, but {allowed}",
        field=field,
        value=value,
        allowed=allowed,
    )


def _ending() -> Unavailable:
    return Unavailable("the reward service is ending")
