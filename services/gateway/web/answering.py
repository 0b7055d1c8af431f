"""Answers: JSON and protobuf, errors with the statuses that the SDK expects."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import zstandard
from starlette.responses import Response

from services.gateway.aside import aside

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from starlette.requests import Request

    from rollmesh.errors import MeshError
    from services.gateway.answers import Answer

JSON, PROTOBUF = "application/json", "application/x-protobuf"
_COMPRESSED_FROM = 16 * 1024

# The SDK repeats 408, 409, 429 and all from 500 on: none of them where a repeat cannot help, and
# never 409, which it repeats for minutes without saying so.
_STATUSES = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "ALREADY_EXISTS": 400,
    "UNIMPLEMENTED": 400,
    "UNAUTHENTICATED": 401,
    "NOT_FOUND": 404,
    "TOO_LARGE": 413,
    "RESOURCE_EXHAUSTED": 429,
    "ABORTED": 503,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 503,
}


async def respond(request: Request, answer: dict[str, Any] | Answer | Response | None) -> Response:
    """`answer` as HTTP; None: there is nothing to say."""
    if isinstance(answer, Response):
        return answer
    if answer is None:
        return Response(status_code=204)
    if isinstance(answer, dict):
        return _packed(request, _json(answer), JSON, 200)
    if answer.message is not None:
        size = answer.message.ByteSize()
        return await aside(size, _packed_message, request, answer.message, answer.status)
    return _packed(request, _json(answer.fields), JSON, answer.status)


def failure(error: MeshError) -> Response:
    """`error` as HTTP: always a body, as an empty one is a proxy's for the SDK."""
    status = _STATUSES.get(error.status, 500)
    headers = {}
    if status in {429, 503}:
        headers["retry-after"] = str(math.ceil(error.retry_after_s) or 1)
    if status == 401:
        stale = getattr(error, "stale", False)
        headers["www-authenticate"] = 'Bearer error="invalid_token"' if stale else "ApiKey"
    return problem(status, str(error), headers=headers, reason=error.reason)


def problem(
    status: int, detail: str, *, headers: dict[str, str] | None = None, **more: str
) -> Response:
    """What went wrong, in words, and what `more` there is to say."""
    return Response(_json({"detail": detail, **more}), status, headers, JSON)


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, allow_nan=False, separators=(",", ":")).encode()


def _packed_message(request: Request, message: Message, status: int) -> Response:
    return _packed(request, message.SerializeToString(), PROTOBUF, status)


def _packed(request: Request, body: bytes, media_type: str, status: int) -> Response:
    """Compressed, where that is welcome and helps."""
    headers = {}
    if len(body) >= _COMPRESSED_FROM and "zstd" in request.headers.get("accept-encoding", ""):
        smaller = zstandard.ZstdCompressor(level=1).compress(body)
        if len(smaller) < 0.9 * len(body):
            body, headers = smaller, {"content-encoding": "zstd", "vary": "accept-encoding"}
    return Response(body, status, headers, media_type)
