"""The environments of one server, running: what each RPC comes to, without gRPC."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from rollmesh.environment.episode import Episode, NoMoreActions, Start, Wire
from rollmesh.environment.scoring import Scorer
from rollmesh.environment.tools import Toolbox
from rollmesh.errors import InvalidRequest, NotFound, Overloaded, Unimplemented

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from rollmesh import chat
    from rollmesh.environment.author import Environment

NUM_THREADS = 16
"""Threads of each environment for functions that are not coroutines, made when they are needed."""


class Host:
    """Environments by name; an async context manager, for as long as they run.

    Raises:
        ValueError: there is none, two have one name, or one can neither score nor play.
    """

    def __init__(self, environments: Sequence[Environment]) -> None:
        self._rooms = {environment.name: _Room(environment) for environment in environments}
        if not environments or len(self._rooms) != len(environments):
            raise ValueError("a server has at least one environment, each with a name of its own")

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            for room in self._rooms.values():
                stack.callback(room.close)
                await stack.enter_async_context(room.environment.resources())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    def describe(self) -> list[chat.EnvironmentInfo]:
        """The environments, in the order in which they were given."""
        return [room.info for room in self._rooms.values()]

    def list_tasks(
        self, environment: str, split: str, page_size: int, page_token: str
    ) -> tuple[list[chat.Task], str]:
        """A page of tasks and the token of the next; errors as of Tasks.page."""
        room = self._named(environment)
        page, token = room.environment.tasks.page(split, page_size, page_token)
        return list(map(room.told, page)), token

    def get_task(self, environment: str, task_id: str) -> chat.Task:
        """One task, or NotFound."""
        room = self._named(environment)
        return room.told(room.environment.tasks.get(task_id))

    async def score(self, environment: str, items: Sequence[chat.Answered]) -> list[chat.Scored]:
        """What answers are worth, in order.

        Raises:
            NotFound, Unimplemented: there is no such environment, or it cannot score.
            InvalidRequest: no items, or too many.
        """
        return await self._named(environment).score(items)

    async def episode(self, wire: Wire) -> None:
        """Plays the episode that comes over `wire`, to its end.

        Raises:
            NotFound, Unimplemented: there is no such environment or task, or it has no episodes.
            InvalidRequest: the first message is no start.
            Overloaded: too many are under way.
        """
        start = await wire.receive()
        if start is None:
            return
        if not isinstance(start, Start):
            raise InvalidRequest("the first message is to be start, it is action", field="start")
        await self._named(start.environment).play(start, wire)

    def _named(self, name: str) -> _Room:
        if not name and len(self._rooms) == 1:
            return next(iter(self._rooms.values()))
        allowed = ", ".join(self._rooms)
        if not name:
            raise InvalidRequest(
                f"environment: which one is meant? There are {allowed}",
                field="environment",
                allowed=allowed,
            )
        if name not in self._rooms:
            raise NotFound(
                f"there is no environment {name[:100]!r}, there is {allowed}",
                environment=name[:100],
                allowed=allowed,
            )
        return self._rooms[name]


class _Room:
    """One environment, running: its threads, and the episodes under way."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.info = environment.info
        if not (self.info.has_score or self.info.has_episodes):
            raise ValueError(f"environment {environment.name!r} has neither a score nor an episode")
        self.threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix=environment.name)
        self._toolbox = Toolbox(environment.tools, self.threads)
        self._scorer = (
            None
            if environment.score_function is None
            else Scorer(
                environment.score_function,
                wants_message=environment.wants_message,
                threads=self.threads,
                num_threads=NUM_THREADS,
            )
        )
        self._num_playing = 0

    def told(self, task: chat.Task) -> chat.Task:
        """`task` as clients see it: the chat is there to be scored, an episode says its own."""
        return task if self.info.has_score else replace(task, messages=())

    async def score(self, items: Sequence[chat.Answered]) -> list[chat.Scored]:
        if self._scorer is None:
            raise Unimplemented(f"environment {self.info.name!r} has episodes only")
        allowed = self.info.limits.max_score_batch
        if not 1 <= len(items) <= allowed:
            raise InvalidRequest(
                f"items: {len(items)} of them, allowed are 1 to {allowed}",
                field="items",
                value=len(items),
                allowed=f"1 to {allowed}",
            )
        return await self._scorer.score(items)

    async def play(self, start: Start, wire: Wire) -> None:
        play = self.environment.play_function
        if play is None:
            raise Unimplemented(f"environment {self.info.name!r} has single turns only")
        if start.seed < 0:
            raise InvalidRequest(f"seed: {start.seed} is below 0", field="seed", value=start.seed)
        task = self.environment.tasks.get(start.task_id)
        with self._admitted():
            episode = Episode(
                task,
                start.seed,
                wire=wire,
                max_turns=self.info.limits.max_turns,
                toolbox=self._toolbox,
            )
            try:
                reward = await play(episode)
            except NoMoreActions:
                reward = None
            await wire.send(episode.last(reward))

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        """Counts the episode."""
        allowed = self.info.limits.max_concurrent_episodes
        if self._num_playing >= allowed:
            raise Overloaded(
                f"{allowed} episodes are under way, the most that may be",
                field="max_concurrent_episodes",
                value=self._num_playing,
                allowed=allowed,
            )
        self._num_playing += 1
        try:
            yield
        finally:
            self._num_playing -= 1

    def close(self) -> None:
        """Let the threads end, each after the item that it is at."""
        self.threads.shutdown(wait=False, cancel_futures=True)
