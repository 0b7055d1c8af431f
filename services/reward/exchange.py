"""What is said on one ScoreEach call.

The caller says a batch, then answers; the service says scores and questions.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from rollmesh.errors import InvalidRequest
from rollmesh.types import ScoreBatch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from rollmesh.chat import Answer, ItemScore, Question

Request: TypeAlias = "ScoreBatch | Answer"
Say: TypeAlias = "Callable[[ItemScore | Question], Awaitable[None]]"


class Exchange:
    """One call. Its questions are bounded by what the items that are under way ask at once.

    Args:
        requests: what the caller says.
        say: says something to the caller.
    """

    def __init__(self, requests: AsyncIterator[Request], say: Say) -> None:
        self._requests = requests
        self._say = say
        self._saying = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._num_asked = 0
        self._waiting: dict[int, asyncio.Future[str]] = {}
        self._ended = False

    async def batch(self) -> ScoreBatch:
        """What the caller says first.

        Raises:
            InvalidRequest: it is no batch.
        """
        async for request in self._requests:
            if isinstance(request, ScoreBatch):
                return request
            raise InvalidRequest(
                f"answer: to question {request.question}, before there is a batch",
                field="answer",
                value=request.question,
                allowed="batch",
            )
        raise InvalidRequest(
            "batch: the stream of requests ended without one", field="batch", allowed="batch"
        )

    async def listen(self) -> None:
        """Take in answers until the caller has no more to say.

        Raises:
            InvalidRequest: a second batch, an answer to nothing, or none to a question.
        """
        async for request in self._requests:
            if isinstance(request, ScoreBatch):
                raise InvalidRequest(
                    "batch: a second one; each has a call of its own",
                    field="batch",
                    allowed="answer",
                )
            self._take(request)
        self._ended = True
        for number in self._waiting:
            raise _unanswered(number)

    def _take(self, answer: Answer) -> None:
        waiting = self._waiting.pop(answer.question, None)
        if waiting is None:
            asked = 1 <= answer.question <= self._num_asked
            raise InvalidRequest(
                f"answer.question: {answer.question} "
                + ("was answered before" if asked else "was not asked"),
                field="answer.question",
                value=answer.question,
                allowed=", ".join(map(str, itertools.islice(self._waiting, 10))) or "none",
            )
        if not waiting.done():
            waiting.set_result(answer.text)

    async def tell(self, score: ItemScore) -> None:
        """Tell what an item is worth."""
        async with self._saying:
            await self._say_whole(score)

    async def ask(self, question: Question) -> str:
        """The caller's answer to `question`, which gets its number here."""
        answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        async with self._saying:
            number = self._num_asked = next(self._numbers)
            if self._ended:
                raise _unanswered(number)
            self._waiting[number] = answered
            await self._say_whole(replace(question, number=number))
        return await answered

    async def _say_whole(self, said: ItemScore | Question) -> None:
        """One at a time, and each to its end, even when another task has failed meanwhile.

        gRPC never ends a call in which a message was broken off: nobody would hear of the failure.
        """
        saying = asyncio.ensure_future(self._say(said))
        try:
            await asyncio.shield(saying)
        except asyncio.CancelledError:
            await asyncio.wait([saying])
            if not saying.cancelled():
                saying.exception()  # The caller may be gone.
            raise


def _unanswered(number: int) -> InvalidRequest:
    return InvalidRequest(
        f"answer: none to question {number}, and the stream of requests has ended",
        field="answer",
        value=number,
    )
