"""The tokens of a request's completions, gathered into chunks that say where they come from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rollmesh.telemetry import record
from rollmesh.types import CompletionChunk, PolicySpan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rollmesh.types import PromptLogprobs
    from services.sampler.backends.base import Delta


class Chunks:
    """Of one request.

    Args:
        indices: of each completion that is drawn, those of the completions that it stands for.
        chunk_tokens: a chunk has at least so many tokens, a completion's last one excepted.
        origin: a span with what all tokens come from.
    """

    def __init__(
        self, indices: Mapping[int, Sequence[int]], chunk_tokens: int, origin: PolicySpan
    ) -> None:
        self._indices = indices
        self._chunk_tokens = chunk_tokens
        self._origin = origin
        # Of a completion that has tokens which are not sent yet.
        self._gathered: dict[int, Delta] = {}
        self._prompt_logprobs: PromptLogprobs | None = None

    def add(self, delta: Delta) -> Iterator[CompletionChunk]:
        """What is to be sent after `delta`."""
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
        if delta.index in self._gathered:
            delta = _joined(self._gathered.pop(delta.index), delta)
        token_ids = delta.token_ids
        if delta.stop_reason is None and len(token_ids) < self._chunk_tokens:
            self._gathered[delta.index] = delta
            return
        span = replace(self._origin, num_tokens=len(token_ids))
        for index in self._indices[delta.index]:
            record("rollmesh.sampler.tokens", len(token_ids))
            yield CompletionChunk(
                index=index,
                token_ids=tuple(token_ids),
                logprobs=tuple(delta.logprobs),
                spans=(span,) if token_ids else (),
                stop_reason=delta.stop_reason,
                prompt_logprobs=self._prompt_logprobs,
                top_token_ids=tuple(map(tuple, delta.top_token_ids)),
                top_logprobs=tuple(map(tuple, delta.top_logprobs)),
            )
            self._prompt_logprobs = None


def _joined(had: Delta, delta: Delta) -> Delta:
    return replace(
        delta,
        token_ids=[*had.token_ids, *delta.token_ids],
        logprobs=[*had.logprobs, *delta.logprobs],
        top_token_ids=[*had.top_token_ids, *delta.top_token_ids],
        top_logprobs=[*had.top_logprobs, *delta.top_logprobs],
    )
