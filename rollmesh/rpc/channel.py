"""How every channel of the mesh is made."""

from __future__ import annotations

import ipaddress
import json
import re
from typing import Any

import grpc
from grpc.aio import Metadata
from opentelemetry.instrumentation.grpc import aio_client_interceptors
from opentelemetry.propagate import inject

from rollmesh.errors import InvalidRequest
from rollmesh.rpc.interceptors import CancelWithCaller

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest message either way. gRPC's own limit of 4 MiB is too small for a batch of long rollouts;
weights are streamed in chunks of EXPORT_CHUNK_BYTES and never need this."""
KEEPALIVE_S = 20
"""Seconds between two pings of a connection that has calls, either way; servers allow twice as
many."""
KEEPALIVE_TIMEOUT_S = 5
"""Seconds in which a ping is answered, or the connection is lost with all its calls."""
EXPORT_CHUNK_BYTES = 1024 * 1024
"""Largest chunk of an adapter's transfer."""

MESSAGE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)


# Safe for every method: mutations carry a request_id or a sequence, or lead to the same state when
# repeated, and gRPC itself never retries a stream that has begun to answer.
def _service_config(*, only_serving: bool) -> str:
    config: dict[str, Any] = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
    if only_serving:
        config["healthCheckConfig"] = {"serviceName": ""}
    return json.dumps(config)


def channel(address: str) -> grpc.aio.Channel:
    """An open channel to `address` (host:port), traced, retrying UNAVAILABLE; close it yourself.

    Of several addresses, with commas between, those that say they serve are called, in turns: of
    coordinators that is the leader. They are numbers, all of IPv4 or all of IPv6; a name may have
    several by itself.

    Raises:
        InvalidRequest: several, and they are not such.
    """
    several = "," in address
    return grpc.aio.insecure_channel(
        _target_of_several(address) if several else address,
        options=[
            *MESSAGE_OPTIONS,
            ("grpc.service_config", _service_config(only_serving=several)),
            # Without these a peer that lost its power is noticed after minutes.
            ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
            # A restarted peer is tried again soon, not after gRPC's default of up to two minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        ],
        interceptors=[*_tracing(), CancelWithCaller()],
    )


def _tracing() -> list[grpc.aio.ClientInterceptor]:
    # An intercepted call that is streamed both ways keeps a task for ever where the server ends it.
    return [
        interceptor
        for interceptor in aio_client_interceptors()
        if not isinstance(interceptor, grpc.aio.StreamStreamClientInterceptor)
    ]


def trace_metadata() -> Metadata:
    """Metadata that puts a call into the current trace; for those streamed both ways.

    A channel does that for all others, and makes a span of each.
    """
    carrier: dict[str, str] = {}
    inject(carrier)
    return Metadata(*carrier.items())


_NUMBER_PORT = re.compile(r"(?:([0-9.]+)|\[([0-9A-Fa-f:.]+)\]):([0-9]{1,5})")


def _target_of_several(text: str) -> str:
    addresses = [address.strip() for address in text.split(",")]
    versions = {_version(address) for address in addresses}
    if versions not in ({4}, {6}):
        allowed = "IPv4:port, separated by commas, or [IPv6]:port"
        raise InvalidRequest(
            f"address: {text[:200]!r} has several that are not {allowed}",
            field="address",
            value=text[:200],
            allowed=allowed,
        )
    return f"ipv{versions.pop()}:{','.join(addresses)}"


def _version(address: str) -> int:
    """Of the IP that it is; 0: it is none with a port."""
    match = _NUMBER_PORT.fullmatch(address)
    if match is None or int(match[3]) > 65535:
        return 0
    try:
        ip = ipaddress.ip_address(match[1] or match[2])
    except ValueError:
        return 0
    return ip.version
