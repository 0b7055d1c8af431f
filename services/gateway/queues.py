"""A model's requests, in the order that its client counted them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh.api.coordinator.v1 import future_service_pb2 as pb
from rollmesh.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidRequest,
    MeshError,
    NotFound,
)
from rollmesh.rpc.channel import MAX_MESSAGE_BYTES
from services.gateway.wire.tickets import TrainTicket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from typing import Any

    from services.gateway.callers import Caller
    from services.gateway.documents import Document, Documents, Fields
    from services.gateway.ports import Futures
    from services.gateway.wire.ids import ModelId

_MAX_WORK_BYTES = MAX_MESSAGE_BYTES - 2**20
_SAID_BYTES = 1000


def run_key(model: ModelId) -> str:
    """Key of its document."""
    return f"runs/{model}"


async def begin_run(documents: Documents, project: str, model: ModelId, run: Fields) -> None:
    """Write down what a model is, before anybody hears of it. `run`: with the `time` of now.

    Raises:
        AlreadyExists: another model is called so.
    """
    found, ours = await documents.create(project, run_key(model), run)
    if not ours and {**found.fields, "time": 0} != {**run, "time": 0}:
        raise AlreadyExists(f"{model} is another model", resource=model)


class Queues:
    """Puts requests at their places.

    What is wrong with one of them takes its place all the same, and fails there: the client counts
    on, and those behind it would wait for ever.
    """

    def __init__(self, futures: Futures, documents: Documents) -> None:
        self._futures = futures
        self._documents = documents

    async def run(self, caller: Caller, model: ModelId) -> Document:
        """The run's document. NotFound: there is no such model for this caller."""
        try:
            return await self._documents.seen(caller.project, run_key(model))
        except NotFound:
            raise NotFound(f"there is no model {model}", resource=model) from None

    async def put(
        self,
        caller: Caller,
        model: ModelId,
        seq: int,
        make: Callable[[], Awaitable[tuple[pb.Work, Mapping[str, Any]]]],
    ) -> dict[str, str]:
        """Take what `make` makes, or its failure, as the model's request `seq`: the ticket.

        Raises:
            NotFound: there is no such model.
            FailedPrecondition: it is the run of a copy, whose order has no beginning.
            AlreadyExists: another request has that number.
            Overloaded: the project has too many unfinished futures.
        """
        if (await self.run(caller, model)).fields.get("copy"):
            raise FailedPrecondition(
                f"{model} is the run of a copy, not to be trained: load its checkpoint instead",
                resource=model,
            )
        note: Mapping[str, Any] = {}
        try:
            work, note = await make()
            if work.ByteSize() > _MAX_WORK_BYTES:
                raise InvalidRequest(
                    f"the request is of {work.ByteSize()} bytes, of {_MAX_WORK_BYTES} at most",
                    value=work.ByteSize(),
                    allowed=_MAX_WORK_BYTES,
                )
        except MeshError as error:
            # What will pass is no reason to use up the request's number.
            if error.retry_after_s:
                raise
            work = refusal(error)
        return await self.take(caller, TrainTicket(model, seq, dict(note)), work)

    async def take(self, caller: Caller, ticket: TrainTicket, work: pb.Work) -> dict[str, str]:
        """Take `work` as it is."""
        await self._futures.create(
            caller.future(ticket.future_id),
            work,
            queue=ticket.model.queue,
            position=ticket.seq,
        )
        return {"request_id": str(ticket), "model_id": str(ticket.model)}


def refusal(error: MeshError) -> pb.Work:
    """Work that fails as `error`, when its turn comes."""
    failure = pb.Failure(
        reason=error.reason,
        message=str(error)[:_SAID_BYTES],
        metadata={key: value[:_SAID_BYTES] for key, value in error.context.items()},
    )
    return pb.Work(refused=failure)
