"""Configuration of the gateway."""

from __future__ import annotations

from pydantic import NonNegativeFloat

from rollmesh.config import Address, Config, PeerAddress
from rollmesh.telemetry import TelemetryConfig


class GatewayConfig(Config):
    """The gateway: HTTP on one side, the coordinator on the other. It keeps nothing itself."""

    listen: Address = "127.0.0.1:7450"
    """Address to serve HTTP at, host:port. Port 0: a free one."""
    coordinator: PeerAddress
    """Address of the coordinator, host:port."""
    drain_s: NonNegativeFloat = 10.0
    """Seconds that requests under way get to finish when the gateway is told to end."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Traces, metrics and logs."""
