"""An environment inside the reward service, served as the others are."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from rollmesh import chat
from rollmesh.errors import InvalidRequest, MeshError, Unimplemented

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.reward.environments.ports import Requests, Tell
    from services.reward.ports import LocalEnvironment

MAX_PAGE = 1000
"""Tasks of a page."""
_MAX_DIGITS = 18


class ServedHere:
    """A LocalEnvironment. A page's token is the number of its first task."""

    def __init__(self, environment: LocalEnvironment) -> None:
        self.name = environment.info.name
        self._environment = environment
        self._num_running = 0
        self._closed: Callable[[], MeshError] | None = None

    async def run(self) -> None:
        """Nothing: it is always there."""

    def close(self, error: Callable[[], MeshError]) -> None:
        """Begin nothing more."""
        self._closed = error

    def break_off(self, error: Callable[[], MeshError]) -> None:
        """Nothing: what runs here ends with the calls that wait for it."""

    def status(self) -> chat.EnvironmentStatus:
        """How it is now."""
        return chat.EnvironmentStatus(
            name=self.name, serving=True, num_serving=1, num_running=self._num_running
        )

    def describe(self) -> chat.EnvironmentInfo:
        """What it is."""
        return self._environment.info

    async def list_tasks(
        self, split: str, page_size: int, page_token: str
    ) -> tuple[list[chat.Task], str]:
        """Tasks of a split, and the token of the next page.

        Raises:
            InvalidRequest: the split, or a token that is none.
        """
        splits = [each.name for each in self._environment.info.splits]
        if split not in splits:
            raise _invalid("split", split, ", ".join(splits))
        if page_token and not (page_token.isdecimal() and len(page_token) <= _MAX_DIGITS):
            raise _invalid("page_token", page_token, "a next_page_token")
        first, count = int(page_token or 0), min(page_size or MAX_PAGE, MAX_PAGE)
        # One more, to know whether there is a next page.
        tasks = await asyncio.to_thread(self._environment.page, split, first, count + 1)
        return tasks[:count], str(first + count) if len(tasks) > count else ""

    async def get_task(self, task_id: str) -> chat.Task:
        """One task; raises NotFound."""
        return await asyncio.to_thread(self._environment.task, task_id)

    async def score(self, items: Sequence[chat.Answered]) -> list[chat.Scored]:
        """What answers are worth, in order."""
        if self._closed is not None:
            raise self._closed()
        self._num_running += 1
        try:
            return await self._environment.score(items)
        finally:
            self._num_running -= 1

    async def play(self, start: chat.Start, requests: Requests, tell: Tell) -> None:
        """It has no episodes."""
        del start, requests, tell
        raise Unimplemented(f"environment {self.name!r} has no episodes", environment=self.name)


def _invalid(field: str, value: str, allowed: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field}: {value[:63]!r} is not {allowed}", field=field, value=value[:63], allowed=allowed
    )
