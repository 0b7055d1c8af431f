"""What a model wrote, told apart into text and calls of tools while it comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from rollmesh.chat_template import CALL_BEGINS, CALL_ENDS, call_of
from services.gateway.openai.text import beginning

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh.chat import ToolCall


class Reader(Protocol):
    """Reads one completion."""

    def push(self, text: str) -> list[str | ToolCall]:
        """What is clear with this much more of the text."""
        ...

    def rest(self) -> list[str | ToolCall]:
        """What is clear now that there is no more."""
        ...


class PlainReader:
    """All of it is text."""

    def push(self, text: str) -> list[str | ToolCall]:
        """The text."""
        return [text] if text else []

    def rest(self) -> list[str | ToolCall]:
        """Nothing waits."""
        return []


class CallReader:
    """Calls are between tags, as `rollmesh.chat_template.answer_of` reads them.

    A call is told as a whole: before its end it may yet turn out to be none, and then it is text.
    White space around calls belongs to neither. What waits is bounded by the completion.
    """

    def __init__(self, new_id: Callable[[int], str]) -> None:
        """`new_id`: of the call with this number."""
        self._new_id = new_id
        self._num_calls = 0
        self._held = ""
        self._inside = False

    def push(self, text: str) -> list[str | ToolCall]:
        """What is clear with this much more of the text."""
        self._held += text
        parts: list[str | ToolCall] = []
        while True:
            tag = CALL_ENDS if self._inside else CALL_BEGINS
            found, ended, behind = self._held.partition(tag)
            if not ended:
                break
            self._held = behind
            if self._inside:
                parts += self._call(found, ended)
            elif found.strip():
                parts.append(found.rstrip())
            self._inside = not self._inside
        if not self._inside:
            parts += self._told()
        return parts

    def rest(self) -> list[str | ToolCall]:
        """What is clear now that there is no more; a call may lack its end."""
        held, self._held = self._held, ""
        if self._inside:
            return self._call(held, "")
        # After a call, or where nothing was said, white space is nothing.
        return [held] if held.strip() or (held and not self._num_calls) else []

    def _call(self, text: str, end: str) -> list[str | ToolCall]:
        call = call_of(text, self._new_id(self._num_calls))
        if call is None:
            return [f"{CALL_BEGINS}{text}{end}"]
        self._num_calls += 1
        return [call]

    def _told(self) -> list[str | ToolCall]:
        """What cannot be part of a tag, or of the white space before one."""
        waiting = beginning(self._held, CALL_BEGINS)
        told = self._held[: len(self._held) - waiting].rstrip()
        if not told:
            return []
        self._held = self._held[len(told) :]
        return [told]


class RequiredCallReader:
    """The whole text is one call, as the constraint that it was drawn by has it."""

    def __init__(self, call_id: str) -> None:
        self._call_id = call_id
        self._text = ""

    def push(self, text: str) -> list[str | ToolCall]:
        """Nothing is clear before the end."""
        self._text += text
        return []

    def rest(self) -> list[str | ToolCall]:
        """The call; a text that was cut off is text."""
        call = call_of(self._text, self._call_id)
        if call is not None:
            return [call]
        return [self._text] if self._text else []
