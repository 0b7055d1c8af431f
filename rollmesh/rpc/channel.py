"""How every channel of the mesh is made."""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from grpc.aio import Metadata
from opentelemetry.instrumentation.grpc import aio_client_interceptors
from opentelemetry.propagate import inject

from rollmesh.errors import InvalidRequest
from rollmesh.rpc.interceptors import CancelWithCaller

if TYPE_CHECKING:
    from pathlib import Path

    from rollmesh.config import TlsConfig

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest message either way. gRPC's own limit of 4 MiB is too small for a batch of long rollouts;
weights are streamed in chunks of EXPORT_CHUNK_BYTES and never need this."""
KEEPALIVE_S = 20
"""Seconds between two pings of a connection that has calls, either way; servers allow twice as
many."""
STRANGERS_KEEPALIVE_S = 310
"""The same, of a server that is not ours: most hang up on who pings it more than once in 5 min."""
KEEPALIVE_TIMEOUT_S = 5
"""Seconds in which a ping, or whatever is sent at all, has to be acknowledged, or the connection is
lost with all its calls."""
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
            *_options(KEEPALIVE_S),
            ("grpc.service_config", _service_config(only_serving=several)),
        ],
        interceptors=[*_tracing(), CancelWithCaller()],
    )


@dataclass(frozen=True, slots=True)
class Stranger:
    """A server that is not ours. Each channel to it has a connection of its own.

    `address`: host:port to connect to. `authority`: that it is known by; empty: the same.
    `credentials` None: plaintext. `server_name`: that its certificate is for; empty: the host of
    the authority.
    """

    address: str
    authority: str = ""
    credentials: grpc.ChannelCredentials | None = None
    server_name: str = ""

    def channel(self) -> grpc.aio.Channel:
        """An open channel, traced, on which nothing is retried by itself; close it yourself."""
        interceptors = [*_tracing(), CancelWithCaller()]
        if self.credentials is None:
            return grpc.aio.insecure_channel(
                self.address, options=self._options(), interceptors=interceptors
            )
        return grpc.aio.secure_channel(
            self.address, self.credentials, options=self._options(), interceptors=interceptors
        )

    def threaded_channel(self) -> grpc.Channel:
        """The same for use beside the event loop, not traced."""
        if self.credentials is None:
            return grpc.insecure_channel(self.address, options=self._options())
        return grpc.secure_channel(self.address, self.credentials, options=self._options())

    def _options(self) -> list[tuple[str, str | int]]:
        options: list[tuple[str, str | int]] = [
            # Somebody waits for it to be back, and polls it anyway.
            *_options(STRANGERS_KEEPALIVE_S, reconnect_s=0.5),
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        authority = self.authority or self.address
        if self.credentials is None:
            return [*options, ("grpc.default_authority", authority)]
        name = self.server_name or authority.rpartition(":")[0].strip("[]")
        return [*options, ("grpc.ssl_target_name_override", name)]


def read_credentials(tls: TlsConfig) -> grpc.ChannelCredentials:
    """What the files of `tls` hold.

    Raises:
        InvalidRequest: one of them cannot be read.
    """
    return grpc.ssl_channel_credentials(
        root_certificates=_read(tls.ca_file, "tls.ca_file"),
        private_key=_read(tls.key_file, "tls.key_file"),
        certificate_chain=_read(tls.certificate_file, "tls.certificate_file"),
    )


def _options(keepalive_s: int, *, reconnect_s: float = 2.0) -> list[tuple[str, int]]:
    return [
        *MESSAGE_OPTIONS,
        # Without these a peer that lost its power is noticed after minutes.
        ("grpc.keepalive_time_ms", keepalive_s * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
        # A restarted peer is tried again soon, not after gRPC's default of up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", int(reconnect_s * 1000)),
    ]


def _read(path: Path | None, field: str) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise InvalidRequest(
            f"{field}: {path}: {error.strerror}", field=field, value=path
        ) from None


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
