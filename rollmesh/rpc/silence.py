"""Streams that say something at short intervals, and are lost when they do not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol, TypeVar

from rollmesh.errors import Unavailable
from rollmesh.types import HEARTBEAT_S, SILENCE_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

Message_co = TypeVar("Message_co", covariant=True)


class Call(Protocol[Message_co]):
    """A streaming call, as grpc.aio's are."""

    def __aiter__(self) -> AsyncIterator[Message_co]:
        """Its messages."""
        ...

    def cancel(self) -> bool:
        """Whoever waits for the next message is cancelled."""
        ...


async def unsilenced(call: Call[Message_co]) -> AsyncIterator[Message_co]:
    """The messages of `call`, which is cancelled when it is silent for too long.

    Time counts in ticks of the event loop: a loop that was busy itself for long takes that for one
    tick, and not for silence of the other side. Nor does the time of whoever reads slowly count.

    Raises:
        Unavailable: no message came for SILENCE_S.
    """
    loop = asyncio.get_running_loop()
    silent_ticks = 0
    waiting = True
    # For good: what had come when the call was cancelled is still read, and then nothing is.
    silenced = False
    ticking: asyncio.TimerHandle

    def tick() -> None:
        nonlocal silent_ticks, silenced, ticking
        silent_ticks += waiting
        if silent_ticks > SILENCE_S / HEARTBEAT_S:
            silenced = True
            call.cancel()
        else:
            ticking = loop.call_later(HEARTBEAT_S, tick)

    ticking = loop.call_later(HEARTBEAT_S, tick)
    try:
        async for message in call:
            silent_ticks = 0
            waiting = False
            yield message
            waiting = True
    except asyncio.CancelledError:
        task = asyncio.current_task()
        cancelled = task is not None and task.cancelling()
        if silenced and not cancelled:
            raise Unavailable(f"nothing came for {SILENCE_S:g} s") from None
        raise
    finally:
        ticking.cancel()
