"""Client of SweepService."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from rollmesh import convert
from rollmesh.api.coordinator.v1 import sweep_service_pb2 as pb
from rollmesh.api.coordinator.v1.sweep_service_pb2_grpc import SweepServiceStub
from rollmesh.rpc.status import mesh_errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from rollmesh.api.coordinator.v1.sweep_service_pb2_grpc import SweepServiceAsyncStub
    from rollmesh.sweep import Sweep, SweepSpec


class SweepClient:
    """SweepService, typed. Every method raises the MeshError that the coordinator raised."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: SweepServiceAsyncStub = SweepServiceStub(channel)

    async def create(
        self, parent: str, spec: SweepSpec, sweep_id: str = "", request_id: str | None = None
    ) -> Sweep:
        """Store a sweep and its jobs. Give a request_id of your own where you repeat the call."""
        request = pb.CreateSweepRequest(
            request_id=request_id or str(uuid.uuid4()),
            parent=parent,
            sweep_id=sweep_id,
            spec=convert.sweep_spec_to_pb(spec),
        )
        with mesh_errors():
            return convert.sweep_from_pb((await self._stub.CreateSweep(request)).sweep)

    async def get(self, name: str) -> Sweep:
        """One sweep with its jobs, the best first."""
        request = pb.GetSweepRequest(name=name)
        with mesh_errors():
            return convert.sweep_from_pb((await self._stub.GetSweep(request)).sweep)

    async def list(self, parent: str) -> AsyncIterator[Sweep]:
        """All sweeps of a project, newest first, without their jobs."""
        request = pb.ListSweepsRequest(parent=parent)
        while True:
            with mesh_errors():
                response = await self._stub.ListSweeps(request)
            for message in response.sweeps:
                yield convert.sweep_from_pb(message)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def cancel(self, name: str) -> Sweep:
        """Cancel all of its jobs that have not ended."""
        request = pb.CancelSweepRequest(name=name)
        with mesh_errors():
            return convert.sweep_from_pb((await self._stub.CancelSweep(request)).sweep)
