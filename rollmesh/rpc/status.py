"""Domain errors to google.rpc.Status and back: the only module that knows both sides."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from rollmesh.errors import (
    BY_REASON,
    AlreadyExists,
    CapacityExhausted,
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    MeshError,
    NotFound,
    QuotaExceeded,
    Unavailable,
    Unimplemented,
)
from rollmesh.names import project_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

DOMAIN = "rollmesh"
"""ErrorInfo.domain of every error of the mesh."""

# What gRPC itself, or a proxy in between, says without our details. A message that is too large is
# RESOURCE_EXHAUSTED there, and no waiting makes it smaller.
_BY_CODE: dict[grpc.StatusCode, type[MeshError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: CapacityExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
}

# What gRPC's client says, with INTERNAL, when a message could not be sent because the call had
# ended meanwhile. What it ended with is lost; `streams.send` does not lose it.
_ENDED_WHILE_WRITING = "Internal error from Core"

# A gRPC client throws away an answer whose trailers exceed 8 KiB and reports that instead, so what
# a caller sent must not come back whole. A message travels three times, once percent-encoded, which
# makes it three times as long at worst: 5,000 bytes here, and the context's few values.
_MAX_MESSAGE_BYTES = 1000
_MAX_VALUE_BYTES = 300


def to_status(error: MeshError) -> grpc.Status:
    """`error` as a status with ErrorInfo and what it has of RetryInfo, BadRequest, QuotaFailure."""
    text = _shortened(str(error), _MAX_MESSAGE_BYTES)
    context = {key: _shortened(value, _MAX_VALUE_BYTES) for key, value in error.context.items()}
    details: list[Message] = [ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=context)]
    if error.retry_after_s:
        retry = RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(retry)
    if error.status == "INVALID_ARGUMENT" and "field" in context:
        violation = BadRequest.FieldViolation(field=context["field"], description=text)
        details.append(BadRequest(field_violations=[violation]))
    if isinstance(error, QuotaExceeded):
        subject = project_name(context.get("project", ""))
        used_up = QuotaFailure.Violation(subject=subject, description=text)
        details.append(QuotaFailure(violations=[used_up]))
    code = Code.Value(error.status)
    packed = [_packed(detail) for detail in details]
    status = Status(code=code, message=text, details=packed)
    return rpc_status.to_status(status)


def to_error(call: grpc.aio.AioRpcError) -> MeshError:
    """The error that the server raised; for a failure of the transport, the nearest of ours."""
    try:
        # from_call asks only for what AioRpcError has too: code, details, trailing_metadata.
        status = rpc_status.from_call(cast("Any", call))
    except ValueError:
        # The server answered with one code, and then the transport failed with another.
        status = None
    info, retry = ErrorInfo(), RetryInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in BY_REASON:
            error = BY_REASON[info.reason](status.message)
            error.context = dict(info.metadata)  # whose keys may be anything
            if any(other.Unpack(retry) for other in status.details):
                error.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
            return error
    if call.details() == _ENDED_WHILE_WRITING:
        return Unavailable("the call ended while a message was sent")
    message = f"{call.code().name}: {call.details()}"
    return _BY_CODE.get(call.code(), InternalError)(message)


@contextlib.contextmanager
def mesh_errors() -> Iterator[None]:
    """Raise the MeshError behind every AioRpcError inside; a cancelled call is cancellation."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.CANCELLED:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise asyncio.CancelledError from error
            # The server dropped the call, as it does when it is shut down under it.
            raise Unavailable(f"CANCELLED: {error.details()}") from error
        raise to_error(error) from error


def _shortened(text: str, limit: int) -> str:
    """`text`, cut to `limit` bytes of UTF-8 where it is longer."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= limit:
        return encoded.decode()
    return encoded[: limit - len("…".encode())].decode(errors="ignore") + "…"


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed
