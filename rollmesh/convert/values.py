"""Small values: times, structs, optional fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from rollmesh import job as jobs

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
    values: dict[str, Any] = jobs.whole_numbers(json_format.MessageToDict(message))
    return values


def time_to_pb(seconds: float) -> Timestamp:
    """Unix seconds as a Timestamp."""
    message = Timestamp()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def time_from_pb(message: Timestamp) -> float:
    """A Timestamp as Unix seconds."""
    return message.ToNanoseconds() / 1e9


def optional(message: Message, name: str) -> Any:
    """The field's value; None: absent."""
    return getattr(message, name) if message.HasField(name) else None
