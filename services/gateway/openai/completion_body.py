"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PlainValidator

from services.gateway.openai.bodies import INT32, Drawing

Prompt = str | list[int]


def _prompts(value: object) -> list[Prompt]:
    """Text, token ids, or a list of either."""
    if isinstance(value, str) or (isinstance(value, list) and _is_token_ids(value)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("text, token ids, or a list of either")
    for prompt in value:
        if not prompt:
            raise ValueError("a prompt is empty")
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and _is_token_ids(prompt)):
            raise ValueError("text, token ids, or a list of either")
    return value


def _is_token_ids(values: list[object]) -> bool:
    return bool(values) and all(type(each) is int and 0 <= each < INT32 for each in values)


class CompletionBody(Drawing):
    """A request of completions."""

    prompt: Annotated[list[Prompt], PlainValidator(_prompts)]
    max_tokens: int | None = Field(16, ge=1, lt=INT32)
    logprobs: int | None = Field(None, ge=0, le=20)
