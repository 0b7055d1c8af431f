"""Sampling parameters, completions, log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rollmesh import types
from rollmesh.api.common.v1 import sampling_pb2
from rollmesh.api.sampler.v1 import sampler_service_pb2
from rollmesh.convert.policies import span_from_pb, span_to_pb
from rollmesh.convert.tensors import floats_from_pb, matrix_from_pb, tensor_to_pb
from rollmesh.convert.values import optional
from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rollmesh.api.common.v1 import tensor_pb2
    from rollmesh.api.coordinator.v1 import sampling_service_pb2

_STOP_REASONS: dict[types.StopReason | None, sampling_pb2.StopReason.ValueType] = {
    None: sampling_pb2.STOP_REASON_UNSPECIFIED,
    "stop": sampling_pb2.STOP_REASON_STOP,
    "length": sampling_pb2.STOP_REASON_LENGTH,
}
KINDS: dict[types.LogprobsKind, sampling_pb2.LogprobsKind.ValueType] = {
    "policy": sampling_pb2.LOGPROBS_KIND_POLICY,
    "sampled": sampling_pb2.LOGPROBS_KIND_SAMPLED,
}


def params_to_pb(params: types.SamplingParams) -> sampling_pb2.SamplingParams:
    """SamplingParams."""
    return sampling_pb2.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=params.seed,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        min_p=params.min_p,
        logit_bias=dict(params.logit_bias),
        json_schema=params.json_schema,  # type: ignore[arg-type]  # None is absent
        regex=params.regex,  # type: ignore[arg-type]
        logprobs_kind=KINDS[params.logprobs_kind],
        prompt_logprobs=params.prompt_logprobs,
        top_logprobs=params.top_logprobs,
    )


def params_from_pb(message: sampling_pb2.SamplingParams) -> types.SamplingParams:
    """SamplingParams."""
    return types.SamplingParams(
        max_tokens=optional(message, "max_tokens"),
        temperature=optional(message, "temperature"),
        top_k=optional(message, "top_k"),
        top_p=optional(message, "top_p"),
        seed=optional(message, "seed"),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        min_p=optional(message, "min_p"),
        logit_bias=tuple(sorted(message.logit_bias.items())),
        json_schema=optional(message, "json_schema"),
        regex=optional(message, "regex"),
        logprobs_kind=kind_from_pb(message.logprobs_kind, field="params.logprobs_kind"),
        prompt_logprobs=optional(message, "prompt_logprobs"),
        top_logprobs=optional(message, "top_logprobs"),
    )


def kind_from_pb(value: sampling_pb2.LogprobsKind.ValueType, *, field: str) -> types.LogprobsKind:
    """LogprobsKind; unspecified: the policy's own."""
    kinds = {number: kind for kind, number in KINDS.items()}
    kinds[sampling_pb2.LOGPROBS_KIND_UNSPECIFIED] = "policy"
    if value not in kinds:
        allowed = ", ".join(KINDS)
        raise InvalidRequest(
            f"{field}: {value} is not one of {allowed}", field=field, value=value, allowed=allowed
        )
    return kinds[value]


def continuations_to_pb(
    continuations: Iterable[types.Continuation],
) -> list[sampling_pb2.Continuation]:
    """Continuations."""
    return [
        sampling_pb2.Continuation(index=begun.index, token_ids=begun.token_ids)
        for begun in continuations
    ]


def continuations_from_pb(
    messages: Iterable[sampling_pb2.Continuation],
) -> tuple[types.Continuation, ...]:
    """Continuations."""
    return tuple(types.Continuation(begun.index, tuple(begun.token_ids)) for begun in messages)


def prompt_logprobs_to_pb(prompt: types.PromptLogprobs) -> sampling_pb2.PromptLogprobs:
    """PromptLogprobs."""
    shape = (len(prompt.logprobs), -1 if prompt.logprobs else 0)
    return sampling_pb2.PromptLogprobs(
        logprobs=tensor_to_pb(prompt.logprobs),
        top_token_ids=tensor_to_pb(np.reshape(prompt.top_token_ids, shape), "<i4"),
        top_logprobs=tensor_to_pb(np.reshape(prompt.top_logprobs, shape)),
    )


def prompt_logprobs_from_pb(message: sampling_pb2.PromptLogprobs) -> types.PromptLogprobs:
    """PromptLogprobs."""
    token_ids = matrix_from_pb(message.top_token_ids, field="top_token_ids", dtype="<i4")
    logprobs = matrix_from_pb(message.top_logprobs, field="top_logprobs", dtype="<f4")
    return types.PromptLogprobs(
        floats_from_pb(message.logprobs),
        tuple(tuple(row) for row in token_ids.tolist()),
        tuple(tuple(row) for row in logprobs.tolist()),
    )


def chunk_to_pb(chunk: types.CompletionChunk) -> sampling_pb2.CompletionChunk:
    """CompletionChunk."""
    return sampling_pb2.CompletionChunk(
        index=chunk.index,
        token_ids=chunk.token_ids,
        logprobs=tensor_to_pb(chunk.logprobs),
        spans=[span_to_pb(span) for span in chunk.spans],
        stop_reason=_STOP_REASONS[chunk.stop_reason],
        prompt_logprobs=prompt_logprobs_to_pb(chunk.prompt_logprobs)
        if chunk.prompt_logprobs
        else None,
        top_token_ids=_rows_to_pb(chunk.top_token_ids, "<i4"),
        top_logprobs=_rows_to_pb(chunk.top_logprobs, "<f4"),
    )


def chunk_from_pb(message: sampling_pb2.CompletionChunk) -> types.CompletionChunk:
    """CompletionChunk."""
    reasons = {number: reason for reason, number in _STOP_REASONS.items()}
    return types.CompletionChunk(
        index=message.index,
        token_ids=tuple(message.token_ids),
        logprobs=floats_from_pb(message.logprobs),
        spans=tuple(span_from_pb(span) for span in message.spans),
        stop_reason=reasons[message.stop_reason],
        prompt_logprobs=prompt_logprobs_from_pb(message.prompt_logprobs)
        if message.HasField("prompt_logprobs")
        else None,
        top_token_ids=_rows_from_pb(message.top_token_ids, "top_token_ids", "<i4"),
        top_logprobs=_rows_from_pb(message.top_logprobs, "top_logprobs", "<f4"),
    )


def _rows_to_pb(rows: Sequence[Sequence[float]], dtype: str) -> tensor_pb2.Tensor | None:
    """A row for each token; None: there are none."""
    return tensor_to_pb(np.reshape(rows, (len(rows), -1)), dtype) if rows else None


def _rows_from_pb(
    message: tensor_pb2.Tensor, field: str, dtype: str
) -> tuple[tuple[Any, ...], ...]:
    """Rows of ints or floats; absent: none."""
    if not message.shape:
        return ()
    return tuple(map(tuple, matrix_from_pb(message, field=field, dtype=dtype).tolist()))


def logprobs_from_pb(
    message: sampler_service_pb2.ComputeLogprobsResponse
    | sampling_service_pb2.ComputeLogprobsResponse,
) -> types.Logprobs:
    """ComputeLogprobsResponse of either service."""
    return types.Logprobs(floats_from_pb(message.logprobs), span_from_pb(message.span))


def logprobs_to_pb(
    result: types.Logprobs,
) -> sampler_service_pb2.ComputeLogprobsResponse:
    """ComputeLogprobsResponse of the sampler."""
    return sampler_service_pb2.ComputeLogprobsResponse(
        logprobs=tensor_to_pb(result.logprobs), span=span_to_pb(result.span)
    )
