"""How every channel of the mesh is made."""

from __future__ import annotations

import json

import grpc
from opentelemetry.instrumentation.grpc import aio_client_interceptors

from rollmesh.rpc.interceptors import CancelWithCaller

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest message either way. gRPC's own limit of 4 MiB is too small for a batch of long rollouts;
weights are streamed in chunks of EXPORT_CHUNK_BYTES and never need this."""
KEEPALIVE_S = 20
"""Seconds between two pings of a channel that has calls; servers allow twice as many."""
EXPORT_CHUNK_BYTES = 1024 * 1024
"""Largest chunk of an adapter's transfer."""

MESSAGE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)

# Safe for every method: mutations carry a request_id or a sequence, or lead to the same state when
# repeated, and gRPC itself never retries a stream that has begun to answer.
_SERVICE_CONFIG = json.dumps(
    {
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
)


def channel(address: str) -> grpc.aio.Channel:
    """An open channel to `address` (host:port), traced, retrying UNAVAILABLE; close it yourself."""
    return grpc.aio.insecure_channel(
        address,
        options=[
            *MESSAGE_OPTIONS,
            ("grpc.service_config", _SERVICE_CONFIG),
            # Without these a peer that lost its power is noticed after minutes.
            ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
            ("grpc.keepalive_timeout_ms", 5_000),
            # A restarted peer is tried again soon, not after gRPC's default of up to two minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        ],
        interceptors=[*aio_client_interceptors(), CancelWithCaller()],
    )
