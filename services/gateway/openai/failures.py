"""Errors as OpenAI writes them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rollmesh.errors import MeshError

_HTTP = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNIMPLEMENTED": 400,
    "UNAUTHENTICATED": 401,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 503,
}
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    400: "invalid_request_error",
}
_PARAMS = {
    "num_completions": "n",
    "params.json_schema": "response_format",
    "params.regex": "structured_outputs",
    "prompt.messages": "messages",
}
_MAX_MESSAGE = 2000
"""Characters: each wrong key of a body adds a sentence."""


@dataclass(eq=False)
class Refusal(Exception):
    """What the caller is told instead of an answer."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float = 0.0

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of it, which is also an event of a stream that has begun."""
        return {
            "error": {
                "message": self.message[:_MAX_MESSAGE],
                "type": _TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {}
        if self.status in {429, 503}:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


UNAUTHORIZED = Refusal(
    401,
    "no valid API key: send `Authorization: Bearer KEY` or `X-API-Key: KEY`; "
    "`rollmesh project key create` makes one",
    code="invalid_api_key",
)


def refusal_of(error: MeshError, fields: Mapping[str, str]) -> Refusal:
    """`error` in OpenAI's words. `fields`: what the caller calls the fields of SampleRequest."""
    field = error.context.get("field", "")
    param = {**_PARAMS, **fields}.get(field) or field.removeprefix("params.")
    for ours, theirs in fields.items():
        if field.startswith(f"{ours}["):
            param = theirs + field.removeprefix(ours)
    message = str(error).replace(field, param, 1) if field else str(error)
    status = _HTTP.get(error.status, 500)
    code = error.reason.lower()
    if status == 404:
        param, code = param or "model", "model_not_found"
    elif field == "prompt_token_ids":  # That it is not empty is seen before.
        code = "context_length_exceeded"
    return Refusal(status, message, param or None, code, error.retry_after_s)
