"""Bodies to the mesh's own sampling parameters."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rollmesh.errors import InvalidRequest
from rollmesh.types import SamplingParams
from services.gateway.openai.chat_body import ChatBody
from services.gateway.openai.completion_body import CompletionBody

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.gateway.openai.bodies import Drawing
    from services.gateway.openai.chat_body import Function


def params_of(body: Drawing) -> SamplingParams:
    """How to draw what `body` asks for.

    Raises:
        InvalidRequest: it wants its text to be like two things at once.
    """
    constraints = _constraints(body)
    if len(constraints) > 1:
        first, second, *_ = constraints
        raise InvalidRequest(
            f"{second}: there is {first} already, and a text is drawn by one of them",
            field=second,
            value="both",
            allowed=f"one of {', '.join(constraints)}",
        )
    kind, text = next(iter(constraints.values()), ("", ""))
    max_tokens, top_logprobs = body.max_tokens, 0
    if isinstance(body, ChatBody):
        max_tokens = body.max_completion_tokens or max_tokens
        top_logprobs = body.top_logprobs
    elif isinstance(body, CompletionBody):
        top_logprobs = body.logprobs or 0
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_k=body.top_k if body.top_k and body.top_k > 0 else None,  # vLLM's 0 and -1: all.
        top_p=body.top_p,
        min_p=body.min_p,
        seed=body.seed,
        stop=tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        logit_bias=tuple(sorted(body.logit_bias.items())),
        json_schema=text if kind == "json_schema" else None,
        regex=text if kind == "regex" else None,
        logprobs_kind=body.logprobs_kind,
        top_logprobs=top_logprobs or None,
    )


def _constraints(body: Drawing) -> dict[str, tuple[str, str]]:
    """What a text must be like, by the key of the body that says so: kind, and the constraint."""
    found: dict[str, tuple[str, str]] = {}
    form, outputs = body.response_format, body.structured_outputs
    if form and form.type == "json_object":
        found["response_format"] = "json_schema", '{"type":"object"}'
    if form and form.json_schema:
        found["response_format"] = "json_schema", _json(form.json_schema.schema_)
    if outputs and outputs.regex is not None:
        found["structured_outputs"] = "regex", outputs.regex
    if outputs and outputs.json_ is not None:
        found["structured_outputs"] = "json_schema", _json(outputs.json_)
    if body.guided_regex is not None:
        found["guided_regex"] = "regex", body.guided_regex
    if body.guided_json is not None:
        found["guided_json"] = "json_schema", _json(body.guided_json)
    if isinstance(body, ChatBody) and body.required:
        found["tool_choice"] = "json_schema", _json(_call_schema(body.required))
    return found


def _json(schema: dict[str, Any] | bool | str) -> str:  # noqa: FBT001 - a schema may be one
    return schema if isinstance(schema, str) else json.dumps(schema)


def _call_schema(functions: Sequence[Function]) -> dict[str, Any]:
    """Of a call of one of `functions`, as between the tags that models put around calls."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function.name},
                "arguments": function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}
