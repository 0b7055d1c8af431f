"""What the sampler asks of vLLM, in vLLM's words, and what vLLM answers, in ours."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from rollmesh.errors import InvalidRequest, Unavailable, Unimplemented
from rollmesh.types import PromptLogprobs
from services.sampler.backends.base import Delta
from services.sampler.backends.vllm_provenance import Asked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.outputs import CompletionOutput

    from rollmesh.types import StopReason
    from services.sampler.backends.base import Draw, LoadedAdapter
    from services.sampler.backends.constraints import Kind

CONSTRAINTS = "xgrammar"
"""vLLM's engine for constrained output. One for all: it cannot have several, and its own choice
would depend on what came first."""

_STOP_REASONS: dict[str, StopReason] = {"stop": "stop", "length": "length"}


def asked_for(
    adapter: LoadedAdapter | None,
    draw: Draw | None,
    indices: Sequence[int],
    place: int,
    *,
    project: str,
) -> Asked:
    """What the worker has to know about a request. `draw` None: it is greedy."""
    return Asked(
        number=adapter.number if adapter else 0,
        digest=adapter.digest if adapter else "",
        project=project,
        seed=draw.seed if draw else 0,
        indices=list(indices),
        place=place,
        sampled_logprobs=draw is not None and draw.logprobs_kind == "sampled",
    )


def params_of(draw: Draw, asked: Asked, *, chunk_tokens: int) -> SamplingParams:
    """Of a request for the completions `asked.indices`, which have `asked.place` tokens already.

    vLLM gets no seed: it would make a generator for each request.
    """
    constraint = _structured(draw)
    return CheckedParams(
        n=len(asked.indices),
        temperature=draw.temperature,
        top_k=draw.top_k,
        top_p=draw.top_p,
        min_p=draw.min_p,
        logit_bias=dict(draw.logit_bias) or None,
        structured_outputs=constraint,
        max_tokens=draw.max_tokens - asked.place,
        stop=list(draw.stop),
        stop_token_ids=list(draw.stop_token_ids),
        # The end of sequence is how constrained text ends.
        ignore_eos=draw.ignore_eos and constraint is None,
        # Of the drawn token, and of so many likeliest.
        logprobs=draw.top_logprobs or 0,
        flat_logprobs=True,
        # Text is made only to look for stop strings, special tokens included.
        detokenize=bool(draw.stop),
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        output_kind=RequestOutputKind.DELTA,
        stream_interval=chunk_tokens,
        extra_args=asked.extra_args(),
        skip_clone=True,
    )


class CheckedParams(SamplingParams):  # type: ignore[misc]  # vLLM is untyped to mypy
    """Of whose constraint is known that it can be compiled.

    vLLM would find that out on the event loop, where everybody waits for it.
    """

    def _validate_structured_outputs(self, *_: Any) -> None:
        if self.structured_outputs is not None:
            self.structured_outputs._backend = CONSTRAINTS  # noqa: SLF001 - as vLLM's own does


def constraint_of(draw: Draw) -> tuple[Kind, str] | None:
    """The form that the text has to have.

    Raises:
        Unimplemented: it has to have one, and the package for it is missing.
    """
    constraint: tuple[Kind, str] | None = None
    if draw.json_schema is not None:
        constraint = "json_schema", draw.json_schema
    elif draw.regex is not None:
        constraint = "regex", draw.regex
    if constraint is not None and importlib.util.find_spec(CONSTRAINTS) is None:
        raise Unimplemented(
            f"constrained output needs the package {CONSTRAINTS}, which is not installed here",
            field=f"params.{constraint[0]}",
        )
    return constraint


def missing_feature(kind: Kind, text: str) -> str:
    """What vLLM would say of a schema whose words are right, but not all understood."""
    from vllm.v1.structured_output.backend_xgrammar import (  # noqa: PLC0415 - slow to import
        has_xgrammar_unsupported_json_features,
    )

    if kind == "json_schema" and has_xgrammar_unsupported_json_features(json.loads(text)):
        return f"it uses features that {CONSTRAINTS} does not have"
    return ""


def _structured(draw: Draw) -> StructuredOutputsParams | None:
    if constraint_of(draw) is None:
        return None
    return StructuredOutputsParams(json=draw.json_schema, regex=draw.regex)


def refused(constraint: tuple[Kind, str], reason: str) -> InvalidRequest:
    """What to tell the caller whose constraint vLLM does not take."""
    kind, text = constraint
    field = f"params.{kind}"
    return InvalidRequest(f"{field}: {reason}", field=field, value=text)


def delta_of(piece: CompletionOutput, index: int, draw: Draw) -> Delta:
    """A piece of completion `index`."""
    if piece.finish_reason not in {None, *_STOP_REASONS}:
        constraint = constraint_of(draw)
        if piece.finish_reason == "error" and constraint is not None:
            raise refused(constraint, "cannot be compiled")
        raise Unavailable(f"the engine broke off: {piece.finish_reason}")
    delta = Delta(
        index=index,
        token_ids=piece.token_ids,
        logprobs=piece.logprobs.logprobs,
        stop_reason=_STOP_REASONS.get(piece.finish_reason),
    )
    return delta if draw.top_logprobs is None else _with_top(delta, piece, draw.top_logprobs)


def _with_top(delta: Delta, piece: CompletionOutput, num_top: int) -> Delta:
    """`delta` out of vLLM's flat rows: each token's own log-probability, then the top ones."""
    logprobs = np.reshape(piece.logprobs.logprobs, (-1, 1 + num_top))
    token_ids = np.reshape(piece.logprobs.token_ids, (-1, 1 + num_top)).astype(int)
    token_ids[np.isneginf(logprobs)] = -1
    return replace(
        delta,
        logprobs=logprobs[:, 0].tolist(),
        top_token_ids=token_ids[:, 1:].tolist(),
        top_logprobs=logprobs[:, 1:].tolist(),
    )


class StopStrings:
    """Looks for stop strings in a completion that has tokens already, with vLLM's own detokenizer.

    vLLM itself would take those tokens for a part of the prompt.
    """

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], had: Sequence[int], params: SamplingParams
    ) -> None:
        request = SimpleNamespace(
            request_id="",
            prompt_token_ids=list(prompt),
            prompt_embeds=None,
            sampling_params=params,
        )
        self._text = IncrementalDetokenizer.from_new_request(tokenizer, request)
        self._text.update(list(had), stop_terminated=False)

    def cut(self, delta: Delta) -> Delta:
        """`delta` up to the token that completes a stop string, if one does."""
        before = self._text.num_output_tokens()
        if self._text.update(list(delta.token_ids), stop_terminated=False) is None:
            return delta
        kept = self._text.num_output_tokens() - before
        return delta.part(slice(kept), "stop")


def withheld(delta: Delta, had: Sequence[int], num_seen: int) -> Delta:
    """`delta` of a completion that is drawn again, without what the caller has of it.

    Raises:
        Unavailable: it is not the same one.
    """
    known = had[num_seen : num_seen + len(delta.token_ids)]
    if tuple(delta.token_ids[: len(known)]) != tuple(known):
        raise Unavailable(
            f"completion {delta.index} cannot be continued: drawn again under its constraint, it "
            "is another one"
        )
    return delta.part(slice(len(known), None), delta.stop_reason)


def prompt_params(asked: Asked, num_top: int) -> SamplingParams:
    """For log-probabilities of a prompt; the token that vLLM has to draw as well is thrown away."""
    return SamplingParams(
        max_tokens=1,
        temperature=0,
        prompt_logprobs=num_top,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=asked.extra_args(),
        skip_clone=True,
    )


def prompt_logprobs_of(flat: Any, num_top: int) -> PromptLogprobs:
    """From vLLM's: at each position but the first, the token's own and then the top ones."""
    logprobs = np.reshape(flat.logprobs, (-1, 1 + num_top))
    token_ids = np.reshape(flat.token_ids, (-1, 1 + num_top)).astype(int)
    return PromptLogprobs(
        (math.nan, *logprobs[:, 0].tolist()),
        ((-1,) * num_top, *map(tuple, token_ids[:, 1:].tolist())),
        ((math.nan,) * num_top, *map(tuple, logprobs[:, 1:].tolist())),
    )
