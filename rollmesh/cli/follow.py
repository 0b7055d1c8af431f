"""A job's events to the one that ends it, whatever happens to the connection meanwhile."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollmesh.errors import Unavailable
from rollmesh.job import FINAL_STATES, JobEvent, JobState, StateChanged

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from rollmesh.client import JobClient

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 5.0
MOST_RETRIES = 60
"""In a row, which is about five minutes without a coordinator."""


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """Between two events the coordinator went away; it is tried again after `retry_s` seconds."""

    problem: str
    retry_s: float


async def follow(
    jobs: JobClient,
    name: str,
    *,
    after: int = 0,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> AsyncGenerator[JobEvent | ConnectionLost]:
    """Every event of the job `name` behind number `after` once, in order, to that which ends it.

    Raises:
        Unavailable: the coordinator stayed away for MOST_RETRIES attempts in a row.
    """
    last, retries, ended = after, 0, False
    while True:
        try:
            async for event in jobs.watch(name, after_event=last):
                last, retries, ended = event.number, 0, final_state(event) is not None
                yield event
            problem = "the coordinator ended the stream before the job"
        except Unavailable as error:
            problem = str(error)
        if ended:
            return
        if retries == MOST_RETRIES:
            raise Unavailable(problem, resource=name)
        delay = min(FIRST_DELAY_S * 2**retries, LONGEST_DELAY_S)
        retries += 1
        yield ConnectionLost(problem, delay)
        await sleep(delay)


def final_state(event: JobEvent) -> JobState | None:
    """The state in which `event` ends its job; None: the job goes on."""
    match event.event:
        case StateChanged(to_state=state) if state in FINAL_STATES:
            return state
    return None
