"""Results: what a ticket has come to, in the SDK's words."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rollmesh.convert.values import time_from_pb
from rollmesh.errors import (
    BY_REASON,
    DeadlineExceeded,
    InternalError,
    MeshError,
    NotFound,
    Unavailable,
)
from services.gateway.wire import bodies, tickets
from services.gateway.wire.ids import SamplerId
from services.gateway.wire.outputs import finite, forward_backward_output
from services.gateway.wire.paths import CheckpointPath
from services.gateway.wire.samples import sample_response
from services.gateway.wire.tickets import SampleTicket, TrainTicket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from google.protobuf.message import Message

    from rollmesh.api.coordinator.v1 import future_service_pb2 as pb
    from services.gateway.callers import Caller
    from services.gateway.checkpoints import Checkpoints
    from services.gateway.ports import Futures as FuturePort
    from services.gateway.queues import Queues
    from services.gateway.sampling import Sampling
    from services.gateway.wire.paths import Kind

_USER = {"INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "UNIMPLEMENTED"}
_PASSES = {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
_SAVES: dict[Kind, str] = {
    "weights": "save_weights",
    "sampler_weights": "save_weights_for_sampler",
    "external_weights": "save_weights_external",
}
_ASK_AGAIN_S = 0.5
_SHOWN_AFTER_S = 10.0
"""What waits no longer than this is nothing that a person needs to hear of."""
_MOST_COMPLETIONS = 1000


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a poll. `status`: HTTP's; a `message` is answered as protobuf."""

    fields: dict[str, Any] = field(default_factory=dict)
    message: Message | None = None
    status: int = 200


class Results:
    """Waits for futures. `clock`: Unix seconds.

    `ending`: set when this gateway is told to end; nobody is held any longer then.
    """

    def __init__(
        self,
        futures: FuturePort,
        queues: Queues,
        checkpoints: Checkpoints,
        sampling: Sampling,
        clock: Callable[[], float],
        ending: asyncio.Event,
        *,
        max_hold_s: float,
    ) -> None:
        self._futures = futures
        self._queues = queues
        self._checkpoints = checkpoints
        self._sampling = sampling
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
                        return await self._answer(caller, ticket, future)
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

    async def _answer(
        self, caller: Caller, ticket: TrainTicket | SampleTicket, future: pb.Future
    ) -> Answer:
        match future.WhichOneof("result"):
            case "failure":
                return await self._failed(caller, ticket, future.failure)
            case "sampled" if isinstance(ticket, SampleTicket):
                return Answer(message=sample_response(future.sampled, last_n=ticket.last_n))
            case "forward_backward" | "forward" as kind if isinstance(ticket, TrainTicket):
                result = getattr(future, kind)
                runs = _runs(ticket.note.get("runs"), len(result.logprobs))
                return Answer(
                    message=forward_backward_output(result.logprobs, result.metrics, runs)
                )
            case "optim_step":
                return Answer({"metrics": finite(future.optim_step.metrics), "type": "optim_step"})
            case "create_adapter":
                return Answer({"model_id": str(_of(ticket)), "type": "create_model"})
            case "fork_adapter" | "load_checkpoint":
                path = ticket.note.get("path") if isinstance(ticket, TrainTicket) else None
                fields = {"model_id": str(_of(ticket)), "type": "load_weights"}
                return Answer({**fields, "path": path} if isinstance(path, str) else fields)
            case "kept" if isinstance(ticket, TrainTicket):
                return await self._kept(caller, ticket, future.kept)
        raise NotFound(f"there is no request {ticket}", resource=ticket)

    async def _kept(self, caller: Caller, ticket: TrainTicket, kept: pb.Kept) -> Answer:
        if not kept.HasField("checkpoint"):
            run = await self._queues.run(caller, ticket.model)
            kind = "inflight" if ticket.note.get("sampler") == "inflight" else "snapshot"
            sampler = await self._sampling.adopt(
                caller, ticket.model, ticket.seq, kind, kept, run.fields["base_model"]
            )
            return Answer({"sampling_session_id": str(sampler), "type": "save_weights_for_sampler"})
        text = ticket.note.get("path")
        if not isinstance(text, str):
            raise NotFound(f"there is no request {ticket}", resource=ticket)
        path = CheckpointPath.parse(text)
        await self._checkpoints.settle(caller, path)
        fields: dict[str, Any] = {"path": str(path), "type": _SAVES[path.kind]}
        if path.kind == "external_weights":
            fields["size_bytes"] = kept.checkpoint.num_bytes
        return Answer(fields)

    async def _failed(
        self, caller: Caller, ticket: TrainTicket | SampleTicket, failure: pb.Failure
    ) -> Answer:
        status = BY_REASON.get(failure.reason, MeshError).status
        if isinstance(ticket, SampleTicket):
            ever = failure.metadata.get("quota") == "tokens_per_day"
            again = status in _PASSES and not ever
            if status == "NOT_FOUND":
                again = await self._sampling.revive(caller, ticket.sampler)
            if again:
                # The SDK draws again.
                return Answer({"detail": failure.message, "type": "expired"}, status=410)
        user = status in _USER or failure.reason in {"CANCELLED", "QUOTA_EXCEEDED"}
        return Answer({"error": failure.message, "category": "user" if user else "server"})


def _of(ticket: TrainTicket | SampleTicket) -> object:
    return ticket.model if isinstance(ticket, TrainTicket) else ticket


def _runs(note: object, num_logprobs: int) -> list[list[int]]:
    """The note's, if it fits; else as if all data had been vectors."""
    if isinstance(note, list) and all(
        isinstance(run, list)
        and len(run) == 2
        and all(type(each) is int and 0 <= each <= num_logprobs for each in run)
        for run in note
    ):
        runs: list[list[int]] = note
        if sum(count * max(width, 1) for count, width in runs) == num_logprobs:
            return runs
    return []


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
