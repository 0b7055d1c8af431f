"""Protobuf messages to the values of `rollmesh.types` and `rollmesh.job`, and back.

What a message cannot say rightly (a tensor whose bytes do not fill its shape, an enum left
unspecified) is an InvalidRequest that names the field. Ranges are the cores' business.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import ValidationError

from rollmesh import job as jobs
from rollmesh import types
from rollmesh.api.common.v1 import (
    export_pb2,
    policy_pb2,
    sampling_pb2,
    tensor_pb2,
    training_pb2,
)
from rollmesh.api.coordinator.v1 import (
    adapter_pb2,
    adapter_service_pb2,
    fleet_service_pb2,
    job_pb2,
    sampling_service_pb2,
)
from rollmesh.api.reward.v1 import reward_service_pb2
from rollmesh.api.sampler.v1 import sampler_service_pb2
from rollmesh.api.trainer.v1 import trainer_service_pb2
from rollmesh.config import explain
from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from google.protobuf.message import Message
    from numpy.typing import NDArray

_DTYPES: dict[tensor_pb2.DataType.ValueType, np.dtype[Any]] = {
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
    tensor_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
}
_LOSSES: dict[types.LossName, training_pb2.Loss.ValueType] = {
    "cross_entropy": training_pb2.LOSS_CROSS_ENTROPY,
    "importance_sampling": training_pb2.LOSS_IMPORTANCE_SAMPLING,
}
_STOP_REASONS: dict[types.StopReason | None, sampling_pb2.StopReason.ValueType] = {
    None: sampling_pb2.STOP_REASON_UNSPECIFIED,
    "stop": sampling_pb2.STOP_REASON_STOP,
    "length": sampling_pb2.STOP_REASON_LENGTH,
}
_SPELLED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_ROLES: dict[types.MemberRole, fleet_service_pb2.MemberRole.ValueType] = {
    "trainer": fleet_service_pb2.MEMBER_ROLE_TRAINER,
    "sampler": fleet_service_pb2.MEMBER_ROLE_SAMPLER,
    "reward": fleet_service_pb2.MEMBER_ROLE_REWARD,
}


# --- tensors -------------------------------------------------------------------------------------


def tensor_to_pb(values: NDArray[Any] | Sequence[float], dtype: str = "<f4") -> tensor_pb2.Tensor:
    """`values` as a tensor of `dtype` ("<f4" or "<i4")."""
    array = np.ascontiguousarray(values, dtype=np.dtype(dtype))
    kind = next(kind for kind, known in _DTYPES.items() if known == array.dtype)
    return tensor_pb2.Tensor(dtype=kind, shape=array.shape, data=array.tobytes())


def tensor_from_pb(message: tensor_pb2.Tensor, *, field: str, dtype: str) -> NDArray[Any]:
    """A one-dimensional array of `dtype`; `field` names it in errors."""
    wanted = np.dtype(dtype)
    if _DTYPES.get(message.dtype) != wanted:
        raise InvalidRequest(
            f"{field}.dtype: {tensor_pb2.DataType.Name(message.dtype)}, needed is {wanted.name}",
            field=f"{field}.dtype",
            value=tensor_pb2.DataType.Name(message.dtype),
            allowed=wanted.name,
        )
    shape = tuple(message.shape)
    if len(shape) != 1 or shape[0] < 0 or shape[0] * wanted.itemsize != len(message.data):
        raise InvalidRequest(
            f"{field}: shape {list(shape)} of {wanted.name} does not fit {len(message.data)} "
            "bytes; "
            "one dimension is needed",
            field=field,
            value=list(shape),
        )
    return np.frombuffer(message.data, dtype=wanted)


def floats_from_pb(message: tensor_pb2.Tensor, *, field: str = "logprobs") -> tuple[float, ...]:
    """The elements of a float32 vector."""
    if not message.data:
        return ()
    return tuple(tensor_from_pb(message, field=field, dtype="<f4").tolist())


# --- policies ------------------------------------------------------------------------------------


def lora_to_pb(lora: types.LoraConfig) -> policy_pb2.LoraConfig:
    """LoraConfig."""
    return policy_pb2.LoraConfig(
        rank=lora.rank, alpha=lora.alpha, target_modules=lora.target_modules, seed=lora.seed
    )


def lora_from_pb(message: policy_pb2.LoraConfig) -> types.LoraConfig:
    """LoraConfig."""
    return types.LoraConfig(
        rank=message.rank,
        alpha=message.alpha if message.HasField("alpha") else None,
        target_modules=tuple(message.target_modules),
        seed=message.seed,
    )


def policy_to_pb(policy: types.PolicyRef) -> policy_pb2.PolicyRef:
    """PolicyRef."""
    return policy_pb2.PolicyRef(
        base_model=policy.base_model, adapter=policy.adapter, policy_version=policy.policy_version
    )


def policy_from_pb(message: policy_pb2.PolicyRef) -> types.PolicyRef:
    """PolicyRef."""
    return types.PolicyRef(
        base_model=message.base_model,
        adapter=message.adapter,
        policy_version=message.policy_version if message.HasField("policy_version") else None,
    )


def span_to_pb(span: types.PolicySpan) -> policy_pb2.PolicySpan:
    """PolicySpan."""
    return policy_pb2.PolicySpan(
        num_tokens=span.num_tokens, policy_version=span.policy_version, digest=span.digest
    )


def span_from_pb(message: policy_pb2.PolicySpan) -> types.PolicySpan:
    """PolicySpan."""
    return types.PolicySpan(message.num_tokens, message.policy_version, message.digest)


def source_to_pb(source: types.AdapterSource) -> sampler_service_pb2.AdapterSource:
    """AdapterSource."""
    return sampler_service_pb2.AdapterSource(
        adapter=source.adapter,
        policy_version=source.policy_version,
        digest=source.digest,
        trainer_address=source.trainer_address,
    )


def source_from_pb(message: sampler_service_pb2.AdapterSource) -> types.AdapterSource:
    """AdapterSource."""
    return types.AdapterSource(
        message.adapter, message.policy_version, message.digest, message.trainer_address
    )


def optional_source_from_pb(
    message: sampler_service_pb2.SampleRequest | sampler_service_pb2.ComputeLogprobsRequest,
) -> types.AdapterSource | None:
    """The request's `source`; None: the base model."""
    return source_from_pb(message.source) if message.HasField("source") else None


# --- sampling ------------------------------------------------------------------------------------


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
        max_tokens=_optional(message, "max_tokens"),
        temperature=_optional(message, "temperature"),
        top_k=_optional(message, "top_k"),
        top_p=_optional(message, "top_p"),
        seed=_optional(message, "seed"),
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


# --- training ------------------------------------------------------------------------------------


def datum_to_pb(datum: types.Datum) -> training_pb2.Datum:
    """Datum."""
    message = training_pb2.Datum(
        token_ids=tensor_to_pb(datum.token_ids, "<i4"),
        target_token_ids=tensor_to_pb(datum.target_token_ids, "<i4"),
    )
    for name in ("weights", "sampling_logprobs", "advantages"):
        if (values := getattr(datum, name)) is not None:
            getattr(message, name).CopyFrom(tensor_to_pb(values))
    return message


def data_from_pb(messages: Iterable[training_pb2.Datum]) -> list[types.Datum]:
    """A batch; errors name the datum by its index."""
    return [_datum_from_pb(message, f"data[{index}]") for index, message in enumerate(messages)]


def _datum_from_pb(message: training_pb2.Datum, path: str) -> types.Datum:
    def floats(name: str) -> types.FloatArray | None:
        if not message.HasField(name):  # type: ignore[arg-type]
            return None
        return tensor_from_pb(getattr(message, name), field=f"{path}.{name}", dtype="<f4")

    return types.Datum(
        token_ids=tensor_from_pb(message.token_ids, field=f"{path}.token_ids", dtype="<i4"),
        target_token_ids=tensor_from_pb(
            message.target_token_ids, field=f"{path}.target_token_ids", dtype="<i4"
        ),
        weights=floats("weights"),
        sampling_logprobs=floats("sampling_logprobs"),
        advantages=floats("advantages"),
    )


def loss_to_pb(config: types.LossConfig) -> training_pb2.LossConfig:
    """LossConfig."""
    return training_pb2.LossConfig(loss=_LOSSES[config.loss], kl_coefficient=config.kl_coefficient)


def loss_from_pb(message: training_pb2.LossConfig) -> types.LossConfig:
    """LossConfig."""
    names = {number: name for name, number in _LOSSES.items()}
    if message.loss not in names:
        raise InvalidRequest(
            f"loss_config.loss: {message.loss} is not one of {', '.join(names.values())}",
            field="loss_config.loss",
            value=message.loss,
            allowed=", ".join(names.values()),
        )
    return types.LossConfig(names[message.loss], _optional(message, "kl_coefficient"))


def adam_to_pb(config: types.AdamConfig) -> training_pb2.AdamConfig:
    """AdamConfig."""
    return training_pb2.AdamConfig(
        learning_rate=config.learning_rate,
        beta1=config.beta1,
        beta2=config.beta2,
        epsilon=config.epsilon,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )


def adam_from_pb(message: training_pb2.AdamConfig) -> types.AdamConfig:
    """AdamConfig, absent fields at their defaults."""
    given = {
        name: getattr(message, name)
        for name in ("beta1", "beta2", "epsilon", "weight_decay", "max_grad_norm")
        if message.HasField(name)
    }
    return types.AdamConfig(learning_rate=message.learning_rate, **given)


def arrays_to_pb(arrays: Iterable[types.FloatArray]) -> list[tensor_pb2.Tensor]:
    """float32 vectors."""
    return [tensor_to_pb(array) for array in arrays]


def arrays_from_pb(messages: Iterable[tensor_pb2.Tensor]) -> tuple[types.FloatArray, ...]:
    """float32 vectors."""
    return tuple(tensor_from_pb(message, field="logprobs", dtype="<f4") for message in messages)


# --- adapters ------------------------------------------------------------------------------------


def export_header_to_pb(export: types.AdapterExport) -> export_pb2.AdapterExportHeader:
    """AdapterExportHeader."""
    return export_pb2.AdapterExportHeader(
        adapter=export.adapter,
        policy_version=export.policy_version,
        base_model=export.base_model,
        adapter_config_json=export.adapter_config_json,
        num_bytes=export.num_bytes,
    )


def export_header_from_pb(message: export_pb2.AdapterExportHeader) -> types.AdapterExport:
    """AdapterExportHeader."""
    return types.AdapterExport(
        message.adapter,
        message.policy_version,
        message.base_model,
        message.adapter_config_json,
        message.num_bytes,
    )


def export_part_from_pb(
    message: trainer_service_pb2.ExportAdapterResponse | adapter_service_pb2.ExportAdapterResponse,
) -> types.AdapterExport | bytes | str:
    """One part of an export: the header, a chunk, or the digest of the trailer."""
    match message.WhichOneof("part"):
        case "header":
            return export_header_from_pb(message.header)
        case "chunk":
            return message.chunk
        case _:
            return message.trailer.digest


def trainer_adapter_to_pb(adapter: types.TrainerAdapter) -> trainer_service_pb2.TrainerAdapter:
    """TrainerAdapter."""
    return trainer_service_pb2.TrainerAdapter(
        name=adapter.name,
        lora=lora_to_pb(adapter.lora),
        policy_version=adapter.policy_version,
        next_sequence=adapter.next_sequence,
        has_pending_gradients=adapter.has_pending_gradients,
    )


def trainer_adapter_from_pb(message: trainer_service_pb2.TrainerAdapter) -> types.TrainerAdapter:
    """TrainerAdapter."""
    return types.TrainerAdapter(
        name=message.name,
        lora=lora_from_pb(message.lora),
        policy_version=message.policy_version,
        next_sequence=message.next_sequence,
        has_pending_gradients=message.has_pending_gradients,
    )


def trainer_info_to_pb(info: types.TrainerInfo) -> trainer_service_pb2.GetTrainerResponse:
    """GetTrainerResponse."""
    return trainer_service_pb2.GetTrainerResponse(
        base_model=info.base_model,
        vocab_size=info.vocab_size,
        max_length=info.max_length,
        max_rank=info.max_rank,
        num_adapters=info.num_adapters,
        max_adapters=info.max_adapters,
        target_modules=info.target_modules,
    )


def trainer_info_from_pb(message: trainer_service_pb2.GetTrainerResponse) -> types.TrainerInfo:
    """GetTrainerResponse."""
    return types.TrainerInfo(
        base_model=message.base_model,
        vocab_size=message.vocab_size,
        max_length=message.max_length,
        max_rank=message.max_rank,
        num_adapters=message.num_adapters,
        max_adapters=message.max_adapters,
        target_modules=tuple(message.target_modules),
    )


def sampler_info_to_pb(info: types.SamplerInfo) -> sampler_service_pb2.GetSamplerResponse:
    """GetSamplerResponse."""
    return sampler_service_pb2.GetSamplerResponse(
        base_model=info.base_model,
        vocab_size=info.vocab_size,
        max_length=info.max_length,
        backend=info.backend,
        num_running=info.num_running,
        loaded=[source_to_pb(source) for source in info.loaded],
        max_rank=info.max_rank,
    )


def sampler_info_from_pb(message: sampler_service_pb2.GetSamplerResponse) -> types.SamplerInfo:
    """GetSamplerResponse."""
    return types.SamplerInfo(
        base_model=message.base_model,
        vocab_size=message.vocab_size,
        max_length=message.max_length,
        backend=message.backend,
        num_running=message.num_running,
        loaded=tuple(source_from_pb(source) for source in message.loaded),
        max_rank=message.max_rank,
    )


def adapter_to_pb(adapter: types.Adapter) -> adapter_pb2.Adapter:
    """Adapter."""
    return adapter_pb2.Adapter(
        name=adapter.name,
        base_model=adapter.base_model,
        lora=lora_to_pb(adapter.lora),
        policy_version=adapter.policy_version,
        published_version=adapter.published_version,
        published_digest=adapter.published_digest,
        next_sequence=adapter.next_sequence,
        create_time=time_to_pb(adapter.create_time),
        job=adapter.job,
    )


def adapter_from_pb(message: adapter_pb2.Adapter) -> types.Adapter:
    """Adapter."""
    return types.Adapter(
        name=message.name,
        base_model=message.base_model,
        lora=lora_from_pb(message.lora),
        policy_version=message.policy_version,
        published_version=_optional(message, "published_version"),
        published_digest=message.published_digest,
        next_sequence=message.next_sequence,
        create_time=time_from_pb(message.create_time),
        job=message.job,
    )


# --- rewards and fleet ---------------------------------------------------------------------------


def score_items_to_pb(items: Iterable[types.ScoreItem]) -> list[reward_service_pb2.ScoreItem]:
    """ScoreItems."""
    return [
        reward_service_pb2.ScoreItem(
            completion=item.completion, reference=item.reference, prompt=item.prompt
        )
        for item in items
    ]


def score_items_from_pb(messages: Iterable[reward_service_pb2.ScoreItem]) -> list[types.ScoreItem]:
    """ScoreItems."""
    return [types.ScoreItem(item.completion, item.reference, item.prompt) for item in messages]


def struct_to_pb(values: Mapping[str, Any]) -> Struct:
    """Struct."""
    message = Struct()
    message.update(dict(values))
    return message


def struct_from_pb(message: Struct) -> dict[str, Any]:
    """A mapping of plain values; whole numbers are ints again."""
    values: dict[str, Any] = jobs.whole_numbers(json_format.MessageToDict(message))
    return values


def fleet_to_pb(fleet: types.Fleet) -> fleet_service_pb2.GetFleetResponse:
    """GetFleetResponse."""
    return fleet_service_pb2.GetFleetResponse(
        members=[
            fleet_service_pb2.Member(
                role=_ROLES[member.role],
                address=member.address,
                serving=member.serving,
                base_model=member.base_model,
                problem=member.problem,
                num_adapters=member.num_adapters,
                num_running=member.num_running,
                update_time=time_to_pb(member.update_time),
                backend=member.backend,
            )
            for member in fleet.members
        ],
        num_queued_requests=fleet.num_queued_requests,
    )


def fleet_from_pb(message: fleet_service_pb2.GetFleetResponse) -> types.Fleet:
    """GetFleetResponse."""
    roles = {number: role for role, number in _ROLES.items()}
    return types.Fleet(
        members=tuple(
            types.Member(
                role=roles[member.role],
                address=member.address,
                serving=member.serving,
                base_model=member.base_model,
                problem=member.problem,
                num_adapters=member.num_adapters,
                num_running=member.num_running,
                update_time=time_from_pb(member.update_time),
                backend=member.backend,
            )
            for member in message.members
        ),
        num_queued_requests=message.num_queued_requests,
    )


# --- jobs ----------------------------------------------------------------------------------------


def spec_to_pb(spec: jobs.JobSpec) -> job_pb2.JobSpec:
    """JobSpec; only what was set is sent, so that defaults stay the server's."""
    values = spec.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    message = job_pb2.JobSpec()
    json_format.ParseDict(values, message)
    return message


def spec_from_pb(message: job_pb2.JobSpec) -> jobs.JobSpec:
    """JobSpec.

    Raises:
        InvalidRequest: a value out of range or missing; the message names each key.
    """
    values = json_format.MessageToDict(message, preserving_proto_field_name=True)
    for section in ("adapter", "algorithm", "sampling", "stop"):
        if section in values:
            values[section] = _numbers(values[section])
    try:
        return jobs.JobSpec.model_validate(values)
    except ValidationError as error:
        raise explain(error, jobs.JobSpec, source="spec") from None


def _numbers(value: Any) -> Any:
    """NaN and infinity, which JSON spells as text, as numbers again: the models refuse those."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    return _SPELLED.get(value, value) if isinstance(value, str) else value


def job_to_pb(job: jobs.Job) -> job_pb2.Job:
    """Job."""
    message = job_pb2.Job(
        name=job.name,
        spec=spec_to_pb(job.spec),
        state=_state_to_pb(job.state),
        state_reason=job.state_reason,
        create_time=time_to_pb(job.create_time),
        update_time=time_to_pb(job.update_time),
        adapter=job.adapter,
        step=job.step,
        metrics=job.metrics,
        last_event=job.last_event,
    )
    if job.first_evaluation is not None:
        message.first_evaluation.CopyFrom(_evaluation_to_pb(job.first_evaluation))
    if job.last_evaluation is not None:
        message.last_evaluation.CopyFrom(_evaluation_to_pb(job.last_evaluation))
    return message


def job_from_pb(message: job_pb2.Job) -> jobs.Job:
    """Job."""
    state = _state_from_pb(message.state)
    assert state is not None  # noqa: S101 - a stored job has a state
    return jobs.Job(
        name=message.name,
        spec=spec_from_pb(message.spec),
        state=state,
        state_reason=message.state_reason,
        create_time=time_from_pb(message.create_time),
        update_time=time_from_pb(message.update_time),
        adapter=message.adapter,
        step=message.step,
        metrics=dict(message.metrics),
        first_evaluation=_evaluation_from_pb(message, "first_evaluation"),
        last_evaluation=_evaluation_from_pb(message, "last_evaluation"),
        last_event=message.last_event,
    )


def event_to_pb(event: jobs.JobEvent) -> job_pb2.JobEvent:
    """JobEvent."""
    message = job_pb2.JobEvent(number=event.number, time=time_to_pb(event.time))
    match event.event:
        case jobs.StateChanged() as changed:
            message.state_changed.CopyFrom(
                job_pb2.StateChanged(
                    to=_state_to_pb(changed.to_state),
                    reason=changed.reason,
                    **{"from": _state_to_pb(changed.from_state)},
                )
            )
        case jobs.StepCompleted() as step:
            message.step_completed.CopyFrom(
                job_pb2.StepCompleted(
                    step=step.step,
                    policy_version=step.policy_version,
                    metrics=step.metrics,
                    phases=step.phases,
                )
            )
        case jobs.EvaluationCompleted() as evaluation:
            message.evaluation_completed.CopyFrom(_evaluation_to_pb(evaluation))
        case jobs.Warned() as warning:
            message.warning.CopyFrom(
                job_pb2.Warning(reason=warning.reason, message=warning.message)
            )
    return message


def event_from_pb(message: job_pb2.JobEvent) -> jobs.JobEvent:
    """JobEvent."""
    happening: jobs.Happening
    match message.WhichOneof("event"):
        case "state_changed":
            to_state = _state_from_pb(message.state_changed.to)
            assert to_state is not None  # noqa: S101 - a server never leaves it out
            happening = jobs.StateChanged(
                from_state=_state_from_pb(getattr(message.state_changed, "from")),
                to_state=to_state,
                reason=message.state_changed.reason,
            )
        case "step_completed":
            happening = jobs.StepCompleted(
                step=message.step_completed.step,
                policy_version=message.step_completed.policy_version,
                metrics=dict(message.step_completed.metrics),
                phases=dict(message.step_completed.phases),
            )
        case "evaluation_completed":
            evaluation = _evaluation_from_pb(message, "evaluation_completed")
            assert evaluation is not None  # noqa: S101 - WhichOneof says it is there
            happening = evaluation
        case _:
            happening = jobs.Warned(reason=message.warning.reason, message=message.warning.message)
    return jobs.JobEvent(number=message.number, time=time_from_pb(message.time), event=happening)


def _evaluation_to_pb(evaluation: jobs.EvaluationCompleted) -> job_pb2.EvaluationCompleted:
    return job_pb2.EvaluationCompleted(
        step=evaluation.step,
        reward_mean=evaluation.reward_mean,
        num_tasks=evaluation.num_tasks,
        duration_s=evaluation.duration_s,
    )


def _evaluation_from_pb(message: Message, name: str) -> jobs.EvaluationCompleted | None:
    if not message.HasField(name):
        return None
    evaluation: job_pb2.EvaluationCompleted = getattr(message, name)
    return jobs.EvaluationCompleted(
        step=evaluation.step,
        reward_mean=evaluation.reward_mean,
        num_tasks=evaluation.num_tasks,
        duration_s=evaluation.duration_s,
    )


def _state_to_pb(state: jobs.JobState | None) -> job_pb2.JobState.ValueType:
    return job_pb2.JobState.Value(f"JOB_STATE_{state or 'UNSPECIFIED'}")


def _state_from_pb(state: job_pb2.JobState.ValueType) -> jobs.JobState | None:
    name = job_pb2.JobState.Name(state).removeprefix("JOB_STATE_")
    return next((known for known in get_args(jobs.JobState) if known == name), None)


# --- small things --------------------------------------------------------------------------------


def time_to_pb(seconds: float) -> Timestamp:
    """Unix seconds as a Timestamp."""
    message = Timestamp()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def time_from_pb(message: Timestamp) -> float:
    """A Timestamp as Unix seconds."""
    return message.ToNanoseconds() / 1e9


def _optional(message: Message, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None
