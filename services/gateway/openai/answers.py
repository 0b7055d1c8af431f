"""Answers in OpenAI's form, whole and as a stream's events; one class for each endpoint.

With `return_token_ids` they have vLLM's `prompt_token_ids` and `token_ids`, and beside them
`token_logprobs` and `spans`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from services.gateway.openai.logprobs import Spelling, finite

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rollmesh.chat import ToolCall
    from rollmesh.types import PolicySpan
    from services.gateway.openai.choice import Choice, Piece


@dataclass(frozen=True)
class Heading:
    """What is the same in all parts of one answer. `created`: Unix seconds."""

    id: str
    model: str
    created: int
    with_logprobs: bool
    with_token_ids: bool
    spelling: Spelling


class Answer(Protocol):
    """The form of one endpoint's answers."""

    heading: Heading

    def event(self, choice: Choice, piece: Piece, *, first: bool) -> dict[str, Any] | None:
        """A stream's event about what was added to `choice`; None: there is nothing to tell."""
        ...

    def usage_event(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """A stream's last event, with what it cost."""
        ...

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """All of it at once."""
        ...

    def turn(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """What a trainer wants to know of it."""
        ...


class ChatAnswer:
    """Of POST /v1/chat/completions."""

    def __init__(self, heading: Heading) -> None:
        self.heading = heading

    def event(self, choice: Choice, piece: Piece, *, first: bool) -> dict[str, Any] | None:
        """One choice's delta."""
        heading, chunk = self.heading, piece.chunk
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
        if piece.text:
            delta["content"] = piece.text
        if piece.calls:
            delta["tool_calls"] = [
                {"index": number, **_call(call)}
                for number, call in enumerate(piece.calls, piece.first_call)
            ]
        tells_tokens = chunk.token_ids and (heading.with_logprobs or heading.with_token_ids)
        if not (delta or tells_tokens or piece.finish_reason):
            return None
        told: dict[str, Any] = {
            "index": choice.index,
            "delta": delta,
            "logprobs": heading.spelling.of_chat(chunk.token_ids, chunk.logprobs, piece.rows)
            if heading.with_logprobs
            else None,
            "finish_reason": piece.finish_reason,
        }
        event = self._chunk([told])
        if heading.with_token_ids:
            told |= _tokens(chunk.token_ids, chunk.logprobs, chunk.spans)
            if first:
                event["prompt_token_ids"] = list(choice.prompt_token_ids)
        return event

    def usage_event(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Without a choice."""
        return {**self._chunk([]), "usage": usage(choices)}

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """A chat completion."""
        heading = self.heading
        answer = _headed(heading, "chat.completion", [self._whole(each) for each in choices])
        if heading.with_token_ids:
            answer["prompt_token_ids"] = list(choices[0].prompt_token_ids)
        return {**answer, "usage": usage(choices)}

    def turn(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """All choices answer one prompt."""
        return {
            **_headed(self.heading, "turn", [_turn(choice) for choice in choices]),
            "prompt_token_ids": list(choices[0].prompt_token_ids),
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return _headed(self.heading, "chat.completion.chunk", choices)

    def _whole(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": choice.text if choice.text or not choice.calls else None,
            "refusal": None,
        }
        if choice.calls:
            message["tool_calls"] = [_call(call) for call in choice.calls]
        spelling = self.heading.spelling
        told: dict[str, Any] = {
            "index": choice.index,
            "message": message,
            "logprobs": spelling.of_chat(choice.token_ids, choice.logprobs, choice.rows)
            if self.heading.with_logprobs
            else None,
            "finish_reason": choice.finish_reason,
        }
        if self.heading.with_token_ids:
            told |= _tokens(choice.token_ids, choice.logprobs, choice.spans)
        return told


class CompletionAnswer:
    """Of POST /v1/completions."""

    def __init__(self, heading: Heading) -> None:
        self.heading = heading

    def event(self, choice: Choice, piece: Piece, *, first: bool) -> dict[str, Any] | None:
        """One choice's next text."""
        heading, chunk = self.heading, piece.chunk
        tells_tokens = chunk.token_ids and (heading.with_logprobs or heading.with_token_ids)
        if not (piece.text or tells_tokens or piece.finish_reason):
            return None
        told: dict[str, Any] = {
            "index": choice.index,
            "text": piece.text,
            "logprobs": heading.spelling.of_completion(
                chunk.token_ids, chunk.logprobs, piece.rows, piece.offsets
            )
            if heading.with_logprobs
            else None,
            "finish_reason": piece.finish_reason,
        }
        if heading.with_token_ids:
            told |= _tokens(chunk.token_ids, chunk.logprobs, chunk.spans)
            if first:
                told["prompt_token_ids"] = list(choice.prompt_token_ids)
        return _headed(heading, "text_completion", [told])

    def usage_event(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Without a choice."""
        return {**_headed(self.heading, "text_completion", []), "usage": usage(choices)}

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """A completion."""
        told = [self._whole(each) for each in choices]
        return {**_headed(self.heading, "text_completion", told), "usage": usage(choices)}

    def turn(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Each choice with its own prompt."""
        told = [
            {**_turn(choice), "prompt_token_ids": list(choice.prompt_token_ids)}
            for choice in choices
        ]
        return _headed(self.heading, "turn", told)

    def _whole(self, choice: Choice) -> dict[str, Any]:
        heading = self.heading
        told: dict[str, Any] = {
            "index": choice.index,
            "text": choice.text,
            "logprobs": heading.spelling.of_completion(
                choice.token_ids, choice.logprobs, choice.rows, choice.offsets
            )
            if heading.with_logprobs
            else None,
            "finish_reason": choice.finish_reason,
        }
        if heading.with_token_ids:
            told |= _tokens(choice.token_ids, choice.logprobs, choice.spans)
            told["prompt_token_ids"] = list(choice.prompt_token_ids)
        return told


def usage(choices: Sequence[Choice]) -> dict[str, int]:
    """Tokens of an answer; a prompt counts once, however many completions it has."""
    # Those of one prompt share its tuple.
    prompts = {id(choice.prompt_token_ids): len(choice.prompt_token_ids) for choice in choices}
    drawn = sum(len(choice.token_ids) for choice in choices)
    prompt = sum(prompts.values())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": drawn,
        "total_tokens": prompt + drawn,
    }


def _headed(heading: Heading, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": heading.id,
        "object": kind,
        "created": heading.created,
        "model": heading.model,
        "choices": choices,
    }


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments_json}
    return {"id": call.id, "type": "function", "function": function}


def _tokens(
    token_ids: Iterable[int], logprobs: Iterable[float], spans: Iterable[PolicySpan]
) -> dict[str, Any]:
    return {
        "token_ids": list(token_ids),
        "token_logprobs": [finite(logprob) for logprob in logprobs],
        "spans": _spans(spans),
    }


def _turn(choice: Choice) -> dict[str, Any]:
    return {
        "index": choice.index,
        "token_ids": choice.token_ids,
        "logprobs": [finite(logprob) for logprob in choice.logprobs],
        "spans": _spans(choice.spans),
        "finish_reason": choice.finish_reason,
    }


def _spans(spans: Iterable[PolicySpan]) -> list[dict[str, Any]]:
    """Who drew them is the mesh's own business."""
    return [
        {
            "num_tokens": span.num_tokens,
            "policy_version": span.policy_version,
            "digest": span.digest,
        }
        for span in spans
    ]
