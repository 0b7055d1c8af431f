"""Scores a batch with an author's function of one item, in order, a bounded number at once."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import threading
import time
from typing import TYPE_CHECKING, cast

from rollmesh import chat

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from concurrent.futures import Executor

    from rollmesh.environment.author import Score

MAX_AT_ONCE = 256
"""Items of one batch that a coroutine scores at once; the rest of the batch waits."""

TURN_S = 0.05
"""Seconds after which a batch makes way for others in its threads, once its item is scored."""

log = logging.getLogger(__name__)


class Scorer:
    """An author's function, for batches. A plain one runs in `num_threads` of `threads`."""

    def __init__(
        self, function: Score, *, wants_message: bool, threads: Executor, num_threads: int
    ) -> None:
        self._function = function
        self._wants_message = wants_message
        self._threads = threads
        self._num_threads = num_threads

    async def score(self, items: Sequence[chat.Answered]) -> list[chat.Scored]:
        """What `items` are worth, in order; one that the function fails at has a `failure`."""
        if inspect.iscoroutinefunction(self._function):
            return await self._score_on_loop(items)
        return await self._score_in_threads(items)

    async def _score_on_loop(self, items: Sequence[chat.Answered]) -> list[chat.Scored]:
        room = asyncio.Semaphore(MAX_AT_ONCE)

        async def score(item: chat.Answered) -> chat.Scored:
            async with room:
                try:
                    return _scored(await cast("Awaitable[object]", self._call(item)))
                except Exception as error:  # noqa: BLE001 - the author's code may raise anything
                    return _failed(item, error)

        async with asyncio.TaskGroup() as tasks:
            scores = [tasks.create_task(score(item)) for item in items]
        return [score.result() for score in scores]

    async def _score_in_threads(self, items: Sequence[chat.Answered]) -> list[chat.Scored]:
        # Going to a thread costs more than most functions do, so each takes many items.
        gone = threading.Event()
        num_parts = min(self._num_threads, len(items))
        try:
            async with asyncio.TaskGroup() as tasks:
                parts = [
                    tasks.create_task(self._score_part(items[first::num_parts], gone))
                    for first in range(num_parts)
                ]
        finally:
            gone.set()
        scored = [part.result() for part in parts]
        return [scored[place % num_parts][place // num_parts] for place in range(len(items))]

    async def _score_part(
        self, items: Sequence[chat.Answered], gone: threading.Event
    ) -> list[chat.Scored]:
        loop = asyncio.get_running_loop()
        scores: list[chat.Scored] = []
        while len(scores) < len(items):
            rest = items[len(scores) :]
            scores += await loop.run_in_executor(self._threads, self._score_some, rest, gone)
        return scores

    def _score_some(
        self, items: Sequence[chat.Answered], gone: threading.Event
    ) -> list[chat.Scored]:
        """The scores of the first of `items`, as many as a turn has time for."""
        until = time.monotonic() + TURN_S
        scores: list[chat.Scored] = []
        for item in items:
            try:
                scores.append(_scored(self._call(item)))
            except Exception as error:  # noqa: BLE001 - the author's code may raise anything
                scores.append(_failed(item, error))
            if gone.is_set() or time.monotonic() > until:
                break
        return scores

    def _call(self, item: chat.Answered) -> object:
        answer = item.messages[-1]
        function = cast("Callable[[chat.Task, object], object]", self._function)
        return function(item.task, answer if self._wants_message else answer.content)


def _scored(given: object) -> chat.Scored:
    scored = given if isinstance(given, chat.Scored) else chat.Scored(float(cast("float", given)))
    if scored.failure:
        return chat.Scored(failure=scored.failure)
    for name, value in {"reward": scored.reward, **scored.rewards}.items():
        if not math.isfinite(value):
            return chat.Scored(failure=f"{name}: {value} is not finite")
    return scored


def _failed(item: chat.Answered, error: Exception) -> chat.Scored:
    log.error("scoring an answer to task %r failed", item.task.id, exc_info=error)
    kind = type(error).__name__
    return chat.Scored(failure=f"{kind} in scoring; the environment's log has the traceback")
