"""Records and keys: what the coordinator keeps for services without a state of their own."""

from __future__ import annotations

from rollmesh import types
from rollmesh.api.coordinator.v1 import key_service_pb2, record_service_pb2
from rollmesh.convert.values import time_from_pb, time_to_pb


def record_to_pb(record: types.Record) -> record_service_pb2.Record:
    """Record."""
    return record_service_pb2.Record(
        key=record.key,
        value=record.value,
        revision=record.revision,
        create_time=time_to_pb(record.create_time),
        expire_time=None if record.expire_time is None else time_to_pb(record.expire_time),
    )


def record_from_pb(message: record_service_pb2.Record) -> types.Record:
    """Record."""
    expires = message.HasField("expire_time")
    return types.Record(
        message.key,
        message.value,
        message.revision,
        time_from_pb(message.create_time),
        time_from_pb(message.expire_time) if expires else None,
    )


def key_to_pb(key: types.Key) -> key_service_pb2.Key:
    """Key."""
    return key_service_pb2.Key(
        name=key.name, note=key.note, prefix=key.prefix, create_time=time_to_pb(key.create_time)
    )


def key_from_pb(message: key_service_pb2.Key) -> types.Key:
    """Key."""
    return types.Key(message.name, message.note, message.prefix, time_from_pb(message.create_time))
