"""Small values: times, structs, optional fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from rollmesh import job as jobs
from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.message import Message


def struct_to_pb(values: Mapping[str, Any]) -> Struct:
    """Struct."""
    message = Struct()
    message.update(dict(values))
    return message


def struct_from_pb(message: Struct) -> dict[str, Any]:
    """A mapping of plain values; whole numbers are ints again."""
    values: dict[str, Any] = jobs.whole_numbers(plain(message, field="parameters"))
    return values


def plain(message: Message, *, field: str) -> dict[str, Any]:
    """`message` as plain values, by the names in protos/; `field` names it in errors."""
    try:
        return json_format.MessageToDict(message, preserving_proto_field_name=True)
    except (ValueError, json_format.SerializeToJsonError):
        # A Struct holds what JSON can say, and that is all it refuses to be.
        raise InvalidRequest(
            f"{field}: NaN or infinity among the parameters; numbers there are finite", field=field
        ) from None


def time_to_pb(seconds: float) -> Timestamp:
    """Unix seconds as a Timestamp, to the microsecond: a float holds no more of today's time."""
    message = Timestamp()
    message.FromMicroseconds(round(seconds * 1e6))
    return message


def time_from_pb(message: Timestamp) -> float:
    """A Timestamp as Unix seconds."""
    return message.ToMicroseconds() / 1e6


def duration_to_pb(seconds: float) -> Duration:
    """Seconds as a Duration, to the microsecond."""
    message = Duration()
    message.FromMicroseconds(round(seconds * 1e6))
    return message


def optional_duration_from_pb(message: Message, name: str) -> float | None:
    """The field's seconds; None: absent."""
    value = optional(message, name)
    return None if value is None else value.ToMicroseconds() / 1e6


def optional(message: Message, name: str) -> Any:
    """The field's value; None: absent."""
    return getattr(message, name) if message.HasField(name) else None
