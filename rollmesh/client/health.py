"""Client of grpc.health.v1: whether a server takes work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from rollmesh.rpc.status import mesh_errors

if TYPE_CHECKING:
    import grpc


class HealthClient:
    """Health, of a server as a whole."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = health_pb2_grpc.HealthStub(channel)  # its types leave its calls out

    async def check(self) -> bool:
        """Whether it says SERVING.

        Raises:
            Unimplemented, NotFound: it does not tell its health.
            MeshError: it does not answer.
        """
        with mesh_errors():
            response = await self._stub.Check(health_pb2.HealthCheckRequest())
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)
