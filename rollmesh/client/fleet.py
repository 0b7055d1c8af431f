"""Client of FleetService."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh import convert, types
from rollmesh.api.coordinator.v1 import fleet_service_pb2 as pb
from rollmesh.api.coordinator.v1.fleet_service_pb2_grpc import FleetServiceStub
from rollmesh.rpc.status import mesh_errors

if TYPE_CHECKING:
    import grpc

    from rollmesh.api.coordinator.v1.fleet_service_pb2_grpc import FleetServiceAsyncStub


class FleetClient:
    """FleetService, typed. Every method raises the MeshError that the coordinator raised."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: FleetServiceAsyncStub = FleetServiceStub(channel)

    async def get(self) -> types.Fleet:
        """The members of the mesh and their load."""
        with mesh_errors():
            return convert.fleet_from_pb(await self._stub.GetFleet(pb.GetFleetRequest()))

    async def explain(self, project: str, subject: str = "") -> types.Schedule:
        """Why what waits in `project` waits, and how the project stands; of `subject` alone."""
        request = pb.ExplainScheduleRequest(project=project, subject=subject)
        with mesh_errors():
            return convert.schedule_from_pb(await self._stub.ExplainSchedule(request))
