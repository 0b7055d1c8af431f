"""Policies: LoRA configurations, references, spans, sources."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.api.common.v1 import policy_pb2
from rollmesh.api.coordinator.v1 import sampling_service_pb2
from rollmesh.api.sampler.v1 import sampler_service_pb2
from rollmesh.convert.values import optional, time_from_pb, time_to_pb

if TYPE_CHECKING:
    from google.protobuf.message import Message


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


def optional_lora_from_pb(message: Message, name: str) -> types.LoraConfig | None:
    """The field's LoraConfig; None: absent."""
    value = optional(message, name)
    return None if value is None else lora_from_pb(value)


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
        num_tokens=span.num_tokens,
        policy_version=span.policy_version,
        digest=span.digest,
        sampler=span.sampler,
    )


def span_from_pb(message: policy_pb2.PolicySpan) -> types.PolicySpan:
    """PolicySpan."""
    return types.PolicySpan(
        message.num_tokens, message.policy_version, message.digest, message.sampler
    )


def source_to_pb(source: types.AdapterSource) -> sampler_service_pb2.AdapterSource:
    """AdapterSource."""
    return sampler_service_pb2.AdapterSource(
        adapter=source.adapter,
        policy_version=source.policy_version,
        digest=source.digest,
        trainer_address=source.trainer_address,
        export_key=source.export_key,
    )


def source_from_pb(message: sampler_service_pb2.AdapterSource) -> types.AdapterSource:
    """AdapterSource."""
    return types.AdapterSource(
        message.adapter,
        message.policy_version,
        message.digest,
        message.trainer_address,
        message.export_key,
    )


def optional_source_from_pb(
    message: sampler_service_pb2.SampleRequest | sampler_service_pb2.ComputeLogprobsRequest,
) -> types.AdapterSource | None:
    """The request's `source`; None: the base model."""
    return source_from_pb(message.source) if message.HasField("source") else None


def lease_to_pb(lease: types.Lease) -> sampling_service_pb2.Lease:
    """Lease."""
    return sampling_service_pb2.Lease(
        name=lease.name,
        adapter=lease.adapter,
        policy_version=lease.policy_version,
        digest=lease.digest,
        expire_time=time_to_pb(lease.expire_time),
    )


def lease_from_pb(message: sampling_service_pb2.Lease) -> types.Lease:
    """Lease."""
    return types.Lease(
        message.name,
        message.adapter,
        message.policy_version,
        message.digest,
        time_from_pb(message.expire_time),
    )
