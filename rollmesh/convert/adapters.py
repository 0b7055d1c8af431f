"""Adapters and their exports, trainers, samplers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.api.common.v1 import export_pb2
from rollmesh.api.coordinator.v1 import adapter_pb2, adapter_service_pb2, checkpoint_service_pb2
from rollmesh.api.sampler.v1 import sampler_service_pb2
from rollmesh.api.trainer.v1 import trainer_service_pb2
from rollmesh.convert.policies import lora_from_pb, lora_to_pb, source_from_pb, source_to_pb
from rollmesh.convert.values import (
    duration_to_pb,
    optional,
    optional_duration_from_pb,
    time_from_pb,
    time_to_pb,
)

if TYPE_CHECKING:
    from google.protobuf.message import Message


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
    message: trainer_service_pb2.ExportAdapterResponse
    | adapter_service_pb2.ExportAdapterResponse
    | checkpoint_service_pb2.ExportCheckpointResponse,
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
        epoch=adapter.epoch,
    )


def trainer_adapter_from_pb(message: trainer_service_pb2.TrainerAdapter) -> types.TrainerAdapter:
    """TrainerAdapter."""
    return types.TrainerAdapter(
        name=message.name,
        lora=lora_from_pb(message.lora),
        policy_version=message.policy_version,
        next_sequence=message.next_sequence,
        has_pending_gradients=message.has_pending_gradients,
        epoch=message.epoch,
    )


def snapshot_to_pb(snapshot: types.Snapshot) -> trainer_service_pb2.Snapshot:
    """Snapshot."""
    return trainer_service_pb2.Snapshot(**dataclasses.asdict(snapshot))


def snapshot_from_pb(message: trainer_service_pb2.Snapshot) -> types.Snapshot:
    """Snapshot."""
    return types.Snapshot(
        key=message.key,
        digest=message.digest,
        next_sequence=message.next_sequence,
        policy_version=message.policy_version,
        num_bytes=message.num_bytes,
        weights_digest=message.weights_digest,
    )


def optional_snapshot_from_pb(message: Message, name: str) -> types.Snapshot | None:
    """The field's Snapshot; None: absent."""
    value = optional(message, name)
    return None if value is None else snapshot_from_pb(value)


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
        kept_versions=info.kept_versions,
        instance_id=info.instance_id,
        draining=info.draining,
        held=[
            trainer_service_pb2.HeldAdapter(name=held.name, epoch=held.epoch) for held in info.held
        ],
        adapter_bytes=info.adapter_bytes,
        max_adapter_bytes=info.max_adapter_bytes,
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
        kept_versions=message.kept_versions,
        instance_id=message.instance_id,
        draining=message.draining,
        held=tuple(types.HeldAdapter(held.name, held.epoch) for held in message.held),
        adapter_bytes=message.adapter_bytes,
        max_adapter_bytes=message.max_adapter_bytes,
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
        instance_id=info.instance_id,
        num_queued=info.num_queued,
        max_loras=info.max_loras,
        resident=[source_to_pb(source) for source in info.resident],
        kv_tokens=info.kv_tokens,
        reserved_kv_tokens=info.reserved_kv_tokens,
        draining=info.draining,
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
        instance_id=message.instance_id,
        num_queued=message.num_queued,
        max_loras=message.max_loras,
        resident=tuple(source_from_pb(source) for source in message.resident),
        kv_tokens=message.kv_tokens,
        reserved_kv_tokens=message.reserved_kv_tokens,
        draining=message.draining,
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
        idle_ttl=None if adapter.idle_ttl_s is None else duration_to_pb(adapter.idle_ttl_s),
    )


def adapter_from_pb(message: adapter_pb2.Adapter) -> types.Adapter:
    """Adapter."""
    return types.Adapter(
        name=message.name,
        base_model=message.base_model,
        lora=lora_from_pb(message.lora),
        policy_version=message.policy_version,
        published_version=optional(message, "published_version"),
        published_digest=message.published_digest,
        next_sequence=message.next_sequence,
        create_time=time_from_pb(message.create_time),
        job=message.job,
        idle_ttl_s=optional_duration_from_pb(message, "idle_ttl"),
    )


def checkpoint_to_pb(checkpoint: types.Checkpoint) -> adapter_pb2.Checkpoint:
    """Checkpoint."""
    expire_time = checkpoint.expire_time
    return adapter_pb2.Checkpoint(
        name=checkpoint.name,
        base_model=checkpoint.base_model,
        lora=lora_to_pb(checkpoint.lora),
        policy_version=checkpoint.policy_version,
        digest=checkpoint.digest,
        num_bytes=checkpoint.num_bytes,
        create_time=time_to_pb(checkpoint.create_time),
        expire_time=None if expire_time is None else time_to_pb(expire_time),
    )


def checkpoint_from_pb(message: adapter_pb2.Checkpoint) -> types.Checkpoint:
    """Checkpoint."""
    expire_time = optional(message, "expire_time")
    return types.Checkpoint(
        name=message.name,
        base_model=message.base_model,
        lora=lora_from_pb(message.lora),
        policy_version=message.policy_version,
        digest=message.digest,
        num_bytes=message.num_bytes,
        create_time=time_from_pb(message.create_time),
        expire_time=None if expire_time is None else time_from_pb(expire_time),
    )
