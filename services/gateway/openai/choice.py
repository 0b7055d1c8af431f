"""One completion as its caller sees it: text without what stopped it, and calls of tools."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from rollmesh.chat import ToolCall
from services.gateway.openai.logprobs import rows_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rollmesh.types import CompletionChunk, PolicySpan
    from services.gateway.openai.calls import Reader
    from services.gateway.openai.logprobs import Row
    from services.gateway.openai.text import StopCutter, TextStream

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Piece:
    """What a chunk adds. `first_call`: the number of the first of `calls`.

    For each token, `rows` has the likeliest ones in its place, and `offsets` where in the text it
    begins, in characters.
    """

    chunk: CompletionChunk
    text: str
    calls: tuple[ToolCall, ...]
    first_call: int
    rows: Sequence[Row]
    offsets: tuple[int, ...]
    finish_reason: FinishReason | None


@dataclass
class Choice:
    """One completion, so far.

    Args:
        index: its place in the answer.
        prompt_token_ids: what it answers.
        stream, cutter, reader: what makes text of tokens, ends it, and finds calls in it.
        max_calls: calls beyond it are left out.
        calls_end_it: a call is why the completion ended, and not just what it says.
    """

    index: int
    prompt_token_ids: tuple[int, ...]
    stream: TextStream
    cutter: StopCutter
    reader: Reader
    max_calls: int
    calls_end_it: bool
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    spans: list[PolicySpan] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    _length: int = 0

    def push(self, chunk: CompletionChunk) -> Piece:
        """What `chunk` adds."""
        first_call, parts = len(self.calls), []
        offsets: list[int] = []
        for token_id in chunk.token_ids:
            offsets.append(self._length)
            decoded = self.stream.push([token_id])
            self._length += len(decoded)
            parts += self.reader.push(self.cutter.push(decoded))
        if chunk.stop_reason is not None:
            parts += self.reader.push(self.cutter.push(self.stream.rest()))
            parts += self.reader.push(self.cutter.rest())
            parts += self.reader.rest()
        text = "".join(part for part in parts if isinstance(part, str))
        calls = [part for part in parts if isinstance(part, ToolCall)]
        self.text += text
        self.calls += calls[: max(0, self.max_calls - first_call)]
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        rows = rows_of(chunk)
        self.rows += rows
        self.offsets += offsets
        self._add_spans(chunk.spans)
        if chunk.stop_reason is not None:
            called = bool(self.calls) and self.calls_end_it and chunk.stop_reason == "stop"
            self.finish_reason = "tool_calls" if called else chunk.stop_reason
        return Piece(
            chunk,
            text,
            tuple(self.calls[first_call:]),
            first_call,
            rows,
            tuple(offsets),
            self.finish_reason,
        )

    def _add_spans(self, spans: tuple[PolicySpan, ...]) -> None:
        for span in spans:
            last = self.spans[-1] if self.spans else None
            if last and replace(last, num_tokens=span.num_tokens) == span:
                self.spans[-1] = replace(last, num_tokens=last.num_tokens + span.num_tokens)
            else:
                self.spans.append(span)
