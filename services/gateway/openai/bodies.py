"""What both endpoints take in a body, checked before anything else happens.

Closed: a key that is not known is refused, and so is one that would change what is drawn and cannot
be had. Absent and null are the same. Ranges that the sampler knows it checks itself.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from rollmesh.errors import InvalidRequest

INT32, INT64 = 2**31, 2**63
TokenId = Annotated[int, Field(ge=0, lt=INT32)]

_ONLY: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "length_penalty": 1,
    "min_tokens": 0,
    "modalities": ["text"],
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "spaces_between_special_tokens": True,
    "store": False,
    "suffix": "",
    "use_beam_search": False,
}
"""What is taken for the sake of clients that send every default, and for nothing else."""
_IGNORED = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "user"}
"""Of no influence on what is drawn."""


class Closed(BaseModel):
    """A part of a body."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, populate_by_name=False
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None}


def _is_json(value: object) -> object:
    """What is read of 1e999 cannot be written again."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("a number in it is out of range") from None
    return value


AnyObject = Annotated[dict[str, Any], AfterValidator(_is_json)]
AnySchema = Annotated[dict[str, Any] | bool, AfterValidator(_is_json)]
SchemaOrText = Annotated[dict[str, Any] | bool | str, AfterValidator(_is_json)]


class StreamOptions(Closed):
    """What a stream tells beside the text."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False
    include_obfuscation: bool = False  # OpenAI's own padding against eavesdroppers; there is none.


class JsonSchema(Closed):
    """A named schema."""

    name: str = ""
    description: str = ""
    schema_: AnySchema = Field(default_factory=dict, alias="schema")
    strict: bool = True


class ResponseFormat(Closed):
    """What the text must be like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type 'json_schema', and with no other")
        return self


class StructuredOutputs(Closed):
    """vLLM's form of the same."""

    json_: SchemaOrText | None = Field(None, alias="json")
    regex: str | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if (self.json_ is None) == (self.regex is None):
            raise ValueError("either json or regex")
        return self


def _texts(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _bias(value: object) -> object:
    """JSON has its keys as text."""
    if not isinstance(value, dict):
        return value
    if not all(isinstance(key, str) and key.isascii() and key.isdigit() for key in value):
        raise ValueError("its keys are token ids")
    if any(len(key) > 9 for key in value):
        raise ValueError("a token id has at most nine digits")
    return {int(key): bias for key, bias in value.items()}


class Drawing(Closed):
    """How to draw: the part of a body that both endpoints share."""

    model: str = Field(min_length=1, max_length=500)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=1, lt=INT32)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1, lt=INT32)
    min_p: float | None = None
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]], BeforeValidator(_texts), Field(max_length=16)
    ] = []
    stop_token_ids: list[TokenId] = []
    ignore_eos: bool = False
    logit_bias: Annotated[dict[TokenId, float], BeforeValidator(_bias)] = {}
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_regex: str | None = None
    guided_json: SchemaOrText | None = None
    logprobs_kind: Literal["policy", "sampled"] = "policy"
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        for key, only in _ONLY.items():
            found = values.get(key)
            if found is not None and (
                found != only or isinstance(found, bool) != isinstance(only, bool)
            ):
                raise InvalidRequest(
                    f"{key}: {str(found)[:100]} is not supported, allowed is {only!r}",
                    field=key,
                    value=str(found)[:100],
                    allowed=only,
                )
        return {
            key: value for key, value in values.items() if key not in _ONLY and key not in _IGNORED
        }
