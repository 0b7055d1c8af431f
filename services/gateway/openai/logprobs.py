"""Log-probabilities as both endpoints write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rollmesh.types import CompletionChunk
    from services.gateway.openai.text import Decoder

_IMPOSSIBLE = -9999.0
"""Stands for minus infinity, which JSON does not have; OpenAI's own."""


def finite(logprob: float) -> float | None:
    """`logprob` as JSON can have it; NaN, which is not known, is null."""
    if math.isnan(logprob):
        return None
    return max(logprob, _IMPOSSIBLE)


Row = Sequence[tuple[int, float]]
"""The likeliest tokens in one place, and their log-probabilities."""


def rows_of(chunk: CompletionChunk) -> list[Row]:
    """One for each token of `chunk`: empty where none were asked for."""
    if not chunk.top_token_ids:
        return [()] * len(chunk.token_ids)
    return [
        # Fewer may be drawn than were asked for.
        tuple((each, logprob) for each, logprob in zip(*row, strict=True) if each >= 0)
        for row in zip(chunk.top_token_ids, chunk.top_logprobs, strict=True)
    ]


class Spelling:
    """How tokens are written. `as_ids`: token_id:N, as vLLM does for who reads them back."""

    def __init__(self, decoder: Decoder, *, as_ids: bool) -> None:
        self._decoder = decoder
        self._as_ids = as_ids

    def token(self, token_id: int) -> str:
        """One token."""
        if self._as_ids:
            return f"token_id:{token_id}"
        return self._decoder.decode([token_id], skip_special_tokens=False)

    def of_chat(
        self, token_ids: Sequence[int], logprobs: Sequence[float], rows: Sequence[Row]
    ) -> dict[str, Any]:
        """`logprobs` of a chat's choice."""
        content = [
            {
                **self._entry(token_id, logprob),
                "top_logprobs": [self._entry(*likely) for likely in row],
            }
            for token_id, logprob, row in zip(token_ids, logprobs, rows, strict=True)
        ]
        return {"content": content, "refusal": None}

    def of_completion(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        rows: Sequence[Row],
        offsets: Sequence[int],
    ) -> dict[str, Any]:
        """`logprobs` of a completion's choice; what was drawn is among the likeliest anyway."""
        tops = [
            {self.token(each): finite(of_each) for each, of_each in (*row, (token_id, logprob))}
            for token_id, logprob, row in zip(token_ids, logprobs, rows, strict=True)
        ]
        return {
            "tokens": [self.token(token_id) for token_id in token_ids],
            "token_logprobs": [finite(logprob) for logprob in logprobs],
            "top_logprobs": tops if any(rows) else None,
            "text_offset": list(offsets),
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self.token(token_id)
        return {"token": token, "logprob": finite(logprob), "bytes": list(token.encode())}
