"""Chats as chat templates take them, and what a model wrote as a message.

Tool calls are written and read in the form that Hermes models introduced and Qwen, SmolLM and many
others share: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Protocol

from rollmesh.chat import Message, ToolCall
from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rollmesh.chat import Tool

CALL_BEGINS, CALL_ENDS = "<tool_call>", "</tool_call>"
_CALL = re.compile(rf"{CALL_BEGINS}(.*?)(?:{CALL_ENDS}|\Z)", re.DOTALL)


class Decoder(Protocol):
    """What of a tokenizer reads token ids: `rollmesh.tokenizer.ModelTokenizer` is one."""

    @property
    def special_tokens(self) -> Sequence[str]:
        """As text."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text, without special tokens or with them."""
        ...


def template_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """In the form of OpenAI's chat completions; arguments as objects, as templates want them.

    Raises:
        InvalidRequest: the arguments of a tool call are no JSON.
    """
    return [_template_message(message) for message in messages]


def template_tools(tools: Iterable[Tool]) -> list[dict[str, Any]] | None:
    """The same of tools; None: there are none."""
    found = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": json.loads(tool.parameters_schema_json or "{}"),
            },
        }
        for tool in tools
    ]
    return found or None


def answer_of(token_ids: Sequence[int], tokenizer: Decoder, *, num_calls: int = 0) -> Message:
    """What a model wrote, as the assistant's message: its text, and the tools that it calls.

    A call that is no JSON object with a name is not one, and stays in the text. `num_calls`: of the
    episode before, so that ids do not come twice.
    """
    calls: list[ToolCall] = []

    def take(match: re.Match[str]) -> str:
        call = call_of(match[1], f"call_{num_calls + len(calls)}")
        if call is None:
            return match[0]
        calls.append(call)
        return ""

    # To some tokenizers the tags are special tokens too.
    text = tokenizer.decode(token_ids, skip_special_tokens=False)
    if CALL_BEGINS not in text:
        return Message("assistant", tokenizer.decode(token_ids))
    for token in tokenizer.special_tokens:
        if token not in {CALL_BEGINS, CALL_ENDS}:
            text = text.replace(token, "")
    content = _CALL.sub(take, text)
    return Message("assistant", content.strip() if calls else content, tuple(calls))


def call_of(text: str, call_id: str) -> ToolCall | None:
    """The call that a model wrote between the tags; None: it is no JSON object with a name."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    # JSON may escape half a character, which no text on the wire can hold; escaped it stays so.
    name = call["name"].encode(errors="replace").decode()
    return ToolCall(call_id, name, json.dumps(call.get("arguments", {})))


def _template_message(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        found["tool_call_id"] = message.tool_call_id
    return found


def _arguments(call: ToolCall) -> object:
    try:
        return json.loads(call.arguments_json)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"tool_calls: the arguments of a call of {call.name[:63]!r} are no JSON: "
            f"{call.arguments_json[:100]!r}: {error}",
            field="tool_calls.arguments_json",
            value=call.arguments_json[:100],
        ) from None
