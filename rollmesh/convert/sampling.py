"""Sampling parameters, completions, log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.api.common.v1 import sampling_pb2
from rollmesh.api.sampler.v1 import sampler_service_pb2
from rollmesh.convert.policies import span_from_pb, span_to_pb
from rollmesh.convert.tensors import floats_from_pb, tensor_to_pb
from rollmesh.convert.values import optional

if TYPE_CHECKING:
    from rollmesh.api.coordinator.v1 import sampling_service_pb2

_STOP_REASONS: dict[types.StopReason | None, sampling_pb2.StopReason.ValueType] = {
    None: sampling_pb2.STOP_REASON_UNSPECIFIED,
    "stop": sampling_pb2.STOP_REASON_STOP,
    "length": sampling_pb2.STOP_REASON_LENGTH,
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
    )


def chunk_to_pb(chunk: types.CompletionChunk) -> sampling_pb2.CompletionChunk:
    """CompletionChunk."""
    return sampling_pb2.CompletionChunk(
        index=chunk.index,
        token_ids=chunk.token_ids,
        logprobs=tensor_to_pb(chunk.logprobs),
        spans=[span_to_pb(span) for span in chunk.spans],
        stop_reason=_STOP_REASONS[chunk.stop_reason],
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
    )


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
