"""Results: what a ticket has come to, in the SDK's words."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from rollmesh.convert.values import time_from_pb
from rollmesh.errors import (
    DeadlineExceeded,
    InternalError,
    NotFound,
    Unavailable,
)
from services.gateway.answers import Answer
from services.gateway.wire import tickets
from services.gateway.wire.ids import SamplerId
from services.gateway.wire.tickets import SampleTicket, TrainTicket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rollmesh.api.coordinator.v1 import future_service_pb2 as pb
    from services.gateway.answers import Answers
    from services.gateway.callers import Caller
    from services.gateway.ports import Futures as FuturePort
    from services.gateway.wire import bodies

_ASK_AGAIN_S = 0.5
_SHOWN_AFTER_S = 10.0
"""What waits no longer than this is nothing that a person needs to hear of."""


class Results:
    """Waits for futures. `clock`: Unix seconds.

    `ending`: set when this gateway is told to end; nobody is held any longer then.
    """

    def __init__(
        self,
        futures: FuturePort,
        answers: Answers,
        clock: Callable[[], float],
        ending: asyncio.Event,
        *,
        max_hold_s: float,
    ) -> None:
        self._futures = futures
        self._answers = answers
        self._clock = clock
        self._ending = ending
        self._max_hold_s = max_hold_s

    async def retrieve(self, who: Callable[[], Awaitable[Caller]], body: bodies.Retrieve) -> Answer:
        """What has come of a request, once it is done; else, after a while, that it is not.

        While the coordinator is away that is the answer too: the SDK would ask again at once after
        any other.

        Raises:
            MeshError: the caller is nobody, or there was never such a request.
        """
        ticket = tickets.parse(body.request_id)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._max_hold_s
        while True:
            left = max(deadline - loop.time(), 0.0)
            try:
                async with asyncio.timeout(left + 5.0):
                    caller = await who()
                    future = await self._held(caller, ticket, left)
                    if future.done:
                        return await self._answers.to(caller, ticket, future)
                    return _try_again(body.request_id, future, self._clock())
            except NotFound:
                return Answer(
                    {"detail": f"the result of {ticket.future_id} is gone", "type": "expired"},
                    status=410,
                )
            except (Unavailable, DeadlineExceeded, TimeoutError):
                if loop.time() + _ASK_AGAIN_S >= deadline or self._ending.is_set():
                    return _try_again(body.request_id, None, self._clock())
            except InternalError as error:
                # It may be over in a moment; if it is not, asking for ever would help nobody.
                if loop.time() + _ASK_AGAIN_S >= deadline:
                    return Answer({"error": str(error), "category": "server"})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ASK_AGAIN_S):
                    await self._ending.wait()

    async def retrieve_many(self, caller: Caller, body: bodies.RetrieveMany) -> dict[str, Any]:
        """Which samples of a client are done since the last time, or come to be done."""
        sampler = SamplerId.parse(body.target.sampling_session_id)
        hold_s = self._max_hold_s
        if body.timeout is not None:
            hold_s = min(body.timeout, hold_s)
        if self._ending.is_set():
            hold_s = 0.0
        done, cursor = await self._futures.wait_many(
            caller.project,
            sampler.group(body.target.cloned_sampler_id),
            body.prev_cursor,
            hold_s,
        )
        return {
            "completions": [
                {
                    "request_id": name.rpartition("/")[2],
                    "state": "failed" if failed else "finished",
                }
                for name, failed in done
            ],
            "cursor": cursor,
        }

    async def cancel(self, caller: Caller, body: bodies.Retrieve) -> None:
        """Stop a sample; what is done or gone is fine."""
        ticket = tickets.parse(body.request_id)
        if isinstance(ticket, SampleTicket):
            with contextlib.suppress(NotFound):
                await self._futures.cancel(caller.future(ticket.future_id))

    async def _held(
        self, caller: Caller, ticket: TrainTicket | SampleTicket, hold_s: float
    ) -> pb.Future:
        """The future, once it is done or the time is over, also because this gateway ends."""
        name = caller.future(ticket.future_id)
        if self._ending.is_set():
            return await self._futures.wait(name, 0.0)
        waiting = asyncio.ensure_future(self._futures.wait(name, hold_s))
        ending = asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait({waiting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise Unavailable("this gateway is about to end")
            return waiting.result()
        finally:
            for task in (waiting, ending):
                task.cancel()
            await asyncio.gather(waiting, ending, return_exceptions=True)


def _try_again(request_id: str, future: pb.Future | None, now: float) -> Answer:
    """Not done: with why, where it is worth telling."""
    fields = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
    if future is not None and future.HasField("waiting"):
        waiting = future.waiting
        if now - time_from_pb(waiting.since) >= _SHOWN_AFTER_S:
            limited = waiting.rule.startswith("PROJECT_")
            fields["queue_state"] = "paused_rate_limit" if limited else "paused_capacity"
            fields["queue_state_reason"] = waiting.reason
    return Answer(fields, status=408)
