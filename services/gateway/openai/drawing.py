"""Draws what a request asks for, for as long as somebody is there to hear it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence
    from typing import Any

    from starlette.types import Receive

    from rollmesh.client import SamplingClient
    from rollmesh.types import CompletionChunk, PolicyRef, SamplingParams

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody is there to hear the answer."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` comes to; when the client goes away it is cancelled.

    `receive`: of a request whose body has been read.

    Raises:
        ClientGone: it did; and whatever `work` raises.
    """

    async def until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        raise ClientGone

    return await _first_error_of(_beside(until_gone(), work))


async def draw(
    sampling: SamplingClient,
    project: str,
    policy: PolicyRef,
    prompts: Sequence[Sequence[int]],
    num_completions: int,
    params: SamplingParams,
    hear: Callable[[int, CompletionChunk], Awaitable[None]],
) -> None:
    """Draw `num_completions` for each prompt, all at once.

    `hear`: a completion's place among all, and what has come of it. Those of one prompt are next to
    each other. While it waits, nothing more is read of the same prompt's.
    """

    async def of_one(number: int, prompt: Sequence[int]) -> None:
        stream = sampling.stream(project, policy, prompt, num_completions, params)
        async with contextlib.aclosing(stream) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                await hear(number * num_completions + chunk.index, chunk)

    async def of_all() -> None:
        async with asyncio.TaskGroup() as tasks:
            for number, prompt in enumerate(prompts):
                tasks.create_task(of_one(number, prompt))

    await _first_error_of(of_all())


async def _beside(watch: Coroutine[Any, Any, None], work: Coroutine[Any, Any, T]) -> T:
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(watch)
        try:
            return await tasks.create_task(work)
        finally:
            watching.cancel()


async def _first_error_of(work: Coroutine[Any, Any, T]) -> T:
    """As `work`, which fails with a group: one of them tells its caller enough."""
    error: BaseException
    try:
        return await work
    except BaseExceptionGroup as group:
        error = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    raise error
