"""FleetService over the fleet and what explains its schedule."""

# ruff: noqa: N802, ARG002 - gRPC names the methods and says what they take

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rollmesh import convert
from rollmesh.api.coordinator.v1.fleet_service_pb2_grpc import FleetServiceServicer

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from rollmesh import types
    from rollmesh.api.coordinator.v1 import fleet_service_pb2 as pb
    from services.coordinator.explaining import Explaining

    Context = grpc.aio.ServicerContext[Any, Any]


class FleetServicer(FleetServiceServicer):
    """FleetService."""

    def __init__(self, snapshot: Callable[[], types.Fleet], explaining: Explaining) -> None:
        self._snapshot = snapshot
        self._explaining = explaining

    async def GetFleet(self, request: pb.GetFleetRequest, context: Context) -> pb.GetFleetResponse:
        """What runs."""
        return convert.fleet_to_pb(self._snapshot())

    async def ExplainSchedule(
        self, request: pb.ExplainScheduleRequest, context: Context
    ) -> pb.ExplainScheduleResponse:
        """Why what waits does so."""
        return convert.schedule_to_pb(
            await self._explaining.explain(request.project, request.subject)
        )
