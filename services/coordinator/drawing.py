"""The completions of one request, as far as they have come, whoever draws them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Untrue(Unavailable):
    """What a sampler sent is not what it was asked for."""


class Drawing:
    """Tokens by completion; what is asked of the next sampler follows from them.

    The parameters stay those of the whole request, so that each sampler draws what the first one
    would have.
    """

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        params: types.SamplingParams,
    ) -> None:
        """`params` has a seed."""
        self.prompt_token_ids = prompt_token_ids
        self.num_completions = num_completions
        self.params = params
        self.address = ""
        """Of the sampler that draws, or drew last; empty: it has had no place yet."""
        self._tokens: list[list[int]] = [[] for _ in range(num_completions)]
        self._ended = [False] * num_completions

    def parts(self, most: int) -> Iterator[range]:
        """The indices of all completions, at most so many at once."""
        for first in range(0, self.num_completions, most):
            yield range(first, min(first + most, self.num_completions))

    def unfinished(self, part: range) -> list[int]:
        """Those of `part` that have not ended."""
        return [index for index in part if not self._ended[index]]

    def has_begun(self, part: range) -> bool:
        """Whether one of `part` that has not ended has tokens."""
        return any(self._tokens[index] for index in self.unfinished(part))

    def continuations(self, part: range) -> tuple[types.Continuation, ...]:
        """What to ask a sampler for; nothing: for all completions, which begin."""
        if len(part) == self.num_completions and not any(self._ended) and not any(self._tokens):
            return ()
        return tuple(
            types.Continuation(index, tuple(self._tokens[index])) for index in self.unfinished(part)
        )

    def take(
        self, chunk: types.CompletionChunk, part: range, source: types.AdapterSource | None
    ) -> None:
        """Put what one sampler sent to the rest.

        Raises:
            Untrue: it was not asked for, or is not of `source` token for token.
        """
        if chunk.index not in part or self._ended[chunk.index]:
            raise Untrue(f"a chunk came of completion {chunk.index}, which was not asked for")
        check_spans(chunk.spans, len(chunk.token_ids), len(chunk.logprobs), source)
        check_top(chunk, self.params.top_logprobs)
        self._tokens[chunk.index].extend(chunk.token_ids)
        self._ended[chunk.index] = chunk.stop_reason is not None
        if chunk.prompt_logprobs is not None:
            self.params = replace(self.params, prompt_logprobs=None)


def is_constrained(params: types.SamplingParams) -> bool:
    """Whether a grammar says what may be drawn: an engine cannot enter it in the middle."""
    return params.json_schema is not None or params.regex is not None


def check_top(chunk: types.CompletionChunk, num_top: int | None) -> None:
    """Refuse tokens that come without their likeliest, where those were asked for.

    Raises:
        Untrue: what came.
    """
    if num_top is None:
        return
    expected = [num_top] * len(chunk.token_ids)
    for rows in (chunk.top_token_ids, chunk.top_logprobs):
        if [len(row) for row in rows] != expected:
            raise Untrue(
                f"{num_top} likeliest were asked for with each token; {len(chunk.token_ids)} "
                f"tokens came with {len(rows)} rows of {sorted({len(row) for row in rows})}"
            )


def check_spans(
    spans: Sequence[types.PolicySpan],
    num_tokens: int,
    num_logprobs: int,
    source: types.AdapterSource | None,
) -> None:
    """Refuse tokens that are not, one for one, of the policy that was asked for.

    Raises:
        Untrue: names what came.
    """
    covered = sum(span.num_tokens for span in spans)
    if not num_tokens == num_logprobs == covered:
        raise Untrue(
            f"{num_tokens} tokens came with {num_logprobs} logprobs and spans over {covered} tokens"
        )
    asked = (source.policy_version, source.digest) if source else (types.BASE_VERSION, "")
    for span in spans:
        if span.num_tokens < 1 or (span.policy_version, span.digest) != asked:
            raise Untrue(
                f"version {asked[0]} (digest {asked[1]!r}) was asked for; {span.num_tokens} tokens "
                f"came from version {span.policy_version} (digest {span.digest!r})"
            )
