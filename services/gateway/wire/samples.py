"""asample: its body as a SampleRequest, and completions as the SDK reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from rollmesh.api.common.v1 import sampling_pb2
from rollmesh.api.coordinator.v1 import sampling_service_pb2
from rollmesh.api.tinker.v1 import tinker_pb2 as pb
from rollmesh.errors import InvalidRequest, Unimplemented
from services.gateway.wire.bodies import Body, Metadata, Text

if TYPE_CHECKING:
    from rollmesh.api.common.v1 import policy_pb2, tensor_pb2
    from rollmesh.api.coordinator.v1 import future_service_pb2

NO_TOKEN, NO_LOGPROB = 0, -99999.0
"""What stands in a cell of the likeliest tokens where there is none."""
_STOP, _LENGTH = 0, 1

Token = Annotated[int, Field(ge=0, lt=2**31)]


class Chunk(Body):
    """A piece of a prompt; only text has tokens."""

    type: Text = "encoded_text"
    tokens: list[Token] = []


class Prompt(Body):
    """ModelInput."""

    chunks: list[Chunk]


class Params(Body):
    """SamplingParams. `stop`: None: at the end of sequence; empty: never, not even there."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[Token] | list[str] | None = None
    temperature: float = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    top_p: float = 1.0


class Sample(Body):
    """POST asample."""

    sampling_session_id: Text
    seq_id: Annotated[int, Field(ge=0, lt=2**63)]
    prompt: Prompt
    sampling_params: Params
    num_samples: Annotated[int, Field(ge=1, le=1024)] = 1
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    target_prompt_logprobs: Metadata | None = None
    prompt_alt_tokens_k: Annotated[int, Field(ge=0)] = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None


def sample_request(
    body: Sample, project: str, policy: policy_pb2.PolicyRef, *, continue_on_newest: bool
) -> sampling_service_pb2.SampleRequest:
    """What the coordinator is asked for.

    Raises:
        InvalidRequest: names the field.
        Unimplemented: something else than text, or log-probabilities that samplers do not compute.
    """
    if body.target_prompt_logprobs is not None or body.prompt_alt_tokens_k:
        field = "prompt_alt_tokens_k" if body.prompt_alt_tokens_k else "target_prompt_logprobs"
        raise Unimplemented(f"{field}: this mesh's samplers do not compute it", field=field)
    return sampling_service_pb2.SampleRequest(
        project=project,
        policy=policy,
        prompt_token_ids=_prompt(body),
        num_completions=body.num_samples,
        params=_params(body),
        continue_on_newest=continue_on_newest,
    )


def _prompt(body: Sample) -> list[int]:
    tokens: list[int] = []
    for index, chunk in enumerate(body.prompt.chunks):
        if chunk.type != "encoded_text":
            raise Unimplemented(
                f"prompt.chunks[{index}]: {chunk.type[:50]}; only text is read here",
                field="prompt.chunks",
            )
        tokens += chunk.tokens
    last_n = body.prompt_logprobs_last_n
    if not tokens:
        raise InvalidRequest("prompt: it is empty", field="prompt")
    if last_n is not None and (not body.prompt_logprobs or last_n >= len(tokens)):
        raise InvalidRequest(
            f"prompt_logprobs_last_n: {last_n}; it goes with prompt_logprobs and a prompt of more "
            f"tokens than that, not of {len(tokens)}",
            field="prompt_logprobs_last_n",
            value=last_n,
        )
    return tokens


def _params(body: Sample) -> sampling_pb2.SamplingParams:
    given = body.sampling_params
    params = sampling_pb2.SamplingParams(
        max_tokens=given.max_tokens,
        temperature=given.temperature,
        top_k=given.top_k if given.top_k > 0 else None,
        top_p=given.top_p,
        seed=given.seed,
        # Sampled tokens have the log-probabilities of the temperature that they were drawn at.
        logprobs_kind=sampling_pb2.LOGPROBS_KIND_POLICY
        if given.temperature in {0.0, 1.0}
        else sampling_pb2.LOGPROBS_KIND_SAMPLED,
        prompt_logprobs=body.topk_prompt_logprobs
        if body.prompt_logprobs or body.topk_prompt_logprobs
        else None,
    )
    if isinstance(given.stop, str):
        params.stop.append(given.stop)
    elif given.stop is not None:
        params.ignore_eos = not given.stop
        params.stop.extend(each for each in given.stop if isinstance(each, str))
        params.stop_token_ids.extend(each for each in given.stop if isinstance(each, int))
    if body.topk_sample_logprobs:
        params.top_logprobs = body.topk_sample_logprobs
    return params


def sample_response(sampled: future_service_pb2.Sampled, *, last_n: int) -> pb.SampleResponse:
    """SampleResponse; `last_n`: of how many of the prompt's tokens it tells, 0: of all."""
    completions = sorted(sampled.completions, key=lambda each: each.index)
    response = pb.SampleResponse(sequences=map(_sequence, completions))
    prompt = next((c.prompt_logprobs for c in completions if c.HasField("prompt_logprobs")), None)
    if prompt is not None:
        logprobs = np.frombuffer(prompt.logprobs.data, "<f4").copy()
        told = len(logprobs) - last_n if last_n else 0
        logprobs[:told] = np.nan
        response.prompt_logprobs = logprobs.tobytes()
        if len(prompt.top_token_ids.shape) == 2 and prompt.top_token_ids.shape[1]:
            response.topk_prompt_logprobs.CopyFrom(
                _top(prompt.top_token_ids, prompt.top_logprobs, told)
            )
    return response


def _sequence(completion: sampling_pb2.CompletionChunk) -> pb.SampledSequence:
    stopped = completion.stop_reason == sampling_pb2.STOP_REASON_STOP
    sequence = pb.SampledSequence(
        stop_reason=_STOP if stopped else _LENGTH,
        tokens=np.array(completion.token_ids, "<i4").tobytes(),
        logprobs=completion.logprobs.data,
    )
    if completion.HasField("top_token_ids"):
        sequence.topk_sampled_logprobs.CopyFrom(
            _top(completion.top_token_ids, completion.top_logprobs, 0)
        )
    return sequence


def _top(token_ids: tensor_pb2.Tensor, logprobs: tensor_pb2.Tensor, told: int) -> pb.TopkLogprobs:
    """The likeliest tokens [N, k]; none in the first `told` rows."""
    length, k = token_ids.shape
    ids = np.frombuffer(token_ids.data, "<i4").reshape(length, k).copy()
    values = np.frombuffer(logprobs.data, "<f4").reshape(length, k).copy()
    none = (ids < 0) | ~np.isfinite(values)
    none[:told] = True
    ids[none], values[none] = NO_TOKEN, NO_LOGPROB
    return pb.TopkLogprobs(token_ids=ids.tobytes(), logprobs=values.tobytes(), k=k, length=length)
