"""What a future that is done is to the SDK."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rollmesh.errors import BY_REASON, MeshError, NotFound
from services.gateway.aside import aside
from services.gateway.wire.outputs import SUBSTITUTE, finite, forward_backward_output
from services.gateway.wire.paths import CheckpointPath
from services.gateway.wire.samples import sample_response
from services.gateway.wire.tickets import SampleTicket, TrainTicket

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from rollmesh.api.coordinator.v1 import future_service_pb2 as pb
    from services.gateway.callers import Caller
    from services.gateway.checkpoints import Checkpoints
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


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a poll. `status`: HTTP's; a `message` is answered as protobuf."""

    fields: dict[str, Any] = field(default_factory=dict)
    message: Message | None = None
    status: int = 200


class Answers:
    """Answers for futures that are done."""

    def __init__(self, queues: Queues, checkpoints: Checkpoints, sampling: Sampling) -> None:
        self._queues = queues
        self._checkpoints = checkpoints
        self._sampling = sampling

    async def to(
        self, caller: Caller, ticket: TrainTicket | SampleTicket, future: pb.Future
    ) -> Answer:
        """What to say to `ticket`, whose future is done.

        Raises:
            NotFound: the ticket is of something else.
        """
        kind = future.WhichOneof("result")
        if isinstance(ticket, SampleTicket):
            if kind == "sampled":
                sampled = future.sampled
                message = await aside(
                    sampled.ByteSize(), sample_response, sampled, last_n=ticket.last_n
                )
                return Answer(message=message)
            return await self._unsampled(caller, ticket, future.failure)
        match kind:
            case "failure":
                return _failed(future.failure)
            case "forward_backward" | "forward":
                return await aside(future.ByteSize(), _trained, ticket, getattr(future, kind))
            case "kept":
                return await self._kept(caller, ticket, future.kept)
        return Answer(_fields(ticket, future))

    async def _kept(self, caller: Caller, ticket: TrainTicket, kept: pb.Kept) -> Answer:
        if not kept.HasField("checkpoint"):
            run = await self._queues.run(caller, ticket.model)
            sampler = await self._sampling.adopt(
                caller,
                ticket.model,
                ticket.seq,
                kept,
                base_model=run.fields["base_model"],
                inflight=ticket.note.get("sampler") == "inflight",
            )
            return Answer({"sampling_session_id": str(sampler), "type": "save_weights_for_sampler"})
        path = CheckpointPath.parse(str(ticket.note.get("path")))
        await self._checkpoints.settle(caller, path)
        fields: dict[str, Any] = {"path": str(path), "type": _SAVES[path.kind]}
        if path.kind == "external_weights":
            fields["size_bytes"] = kept.checkpoint.num_bytes
        return Answer(fields)

    async def _unsampled(self, caller: Caller, ticket: SampleTicket, failure: pb.Failure) -> Answer:
        """Why nothing was drawn; 410 where the SDK, upon it, may well draw something."""
        status = BY_REASON.get(failure.reason, MeshError).status
        again = status in _PASSES and failure.metadata.get("quota") != "tokens_per_day"
        if status == "NOT_FOUND":
            again = await self._sampling.revive(caller, ticket.sampler)
        if again:
            return Answer({"detail": failure.message, "type": "expired"}, status=410)
        return _failed(failure)


def _fields(ticket: TrainTicket, future: pb.Future) -> dict[str, Any]:
    match future.WhichOneof("result"):
        case "optim_step":
            return {"metrics": finite(future.optim_step.metrics), "type": "optim_step"}
        case "create_adapter":
            return {"model_id": str(ticket.model), "type": "create_model"}
        case "fork_adapter" | "load_checkpoint":
            path = ticket.note.get("path")
            fields = {"model_id": str(ticket.model), "type": "load_weights"}
            return {**fields, "path": path} if isinstance(path, str) else fields
    raise NotFound(f"there is no request {ticket.future_id}", resource=ticket.future_id)


def _trained(ticket: TrainTicket, result: Any) -> Answer:
    """Of a ForwardBackwardResponse or ForwardResponse."""
    metrics = dict(result.metrics)
    if ticket.note.get("substitute"):
        metrics[SUBSTITUTE] = 1.0
    runs = ticket.note.get("runs")
    return Answer(message=forward_backward_output(result.logprobs, metrics, runs))


def _failed(failure: pb.Failure) -> Answer:
    status = BY_REASON.get(failure.reason, MeshError).status
    user = status in _USER or failure.reason in {"CANCELLED", "QUOTA_EXCEEDED"}
    return Answer({"error": failure.message, "category": "user" if user else "server"})
