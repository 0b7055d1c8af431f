"""Log-probabilities as both endpoints write them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.gateway.openai.text import Decoder

_IMPOSSIBLE = -9999.0
"""Stands for minus infinity, which JSON does not have; OpenAI's own."""


def finite(logprob: float) -> float | None:
    """`logprob` as JSON can have it; NaN, which is not known, is null."""
    if math.isnan(logprob):
        return None
    return max(logprob, _IMPOSSIBLE)


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

    def of_chat(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> dict[str, Any]:
        """`logprobs` of a chat's choice."""
        content = [
            {**self._entry(token_id, logprob), "top_logprobs": []}
            for token_id, logprob in zip(token_ids, logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}

    def of_completion(
        self, token_ids: Sequence[int], logprobs: Sequence[float], offsets: Sequence[int]
    ) -> dict[str, Any]:
        """`logprobs` of a completion's choice."""
        return {
            "tokens": [self.token(token_id) for token_id in token_ids],
            "token_logprobs": [finite(logprob) for logprob in logprobs],
            "top_logprobs": None,
            "text_offset": list(offsets),
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self.token(token_id)
        return {"token": token, "logprob": finite(logprob), "bytes": list(token.encode())}
