"""SweepService over Sweeps."""

# ruff: noqa: N802, ARG002 - gRPC names the methods and says what they take

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from rollmesh import convert
from rollmesh.api.coordinator.v1 import sweep_service_pb2 as pb
from rollmesh.api.coordinator.v1.sweep_service_pb2_grpc import SweepServiceServicer

if TYPE_CHECKING:
    import grpc

    from services.coordinator.sweeps import Sweeps

    Context = grpc.aio.ServicerContext[Any, Any]


class SweepServicer(SweepServiceServicer):
    """SweepService."""

    def __init__(self, sweeps: Sweeps) -> None:
        self._sweeps = sweeps

    async def CreateSweep(
        self, request: pb.CreateSweepRequest, context: Context
    ) -> pb.CreateSweepResponse:
        """Stores a sweep and its jobs."""
        # As CreateJob: many tasks take seconds.
        spec = await asyncio.to_thread(convert.sweep_spec_from_pb, request.spec)
        sweep = await self._sweeps.create(
            request.parent, request.sweep_id, spec, request_id=request.request_id
        )
        return pb.CreateSweepResponse(sweep=convert.sweep_to_pb(sweep))

    async def GetSweep(self, request: pb.GetSweepRequest, context: Context) -> pb.GetSweepResponse:
        """One sweep with its jobs."""
        sweep = await self._sweeps.get(request.name)
        return pb.GetSweepResponse(sweep=convert.sweep_to_pb(sweep))

    async def ListSweeps(
        self, request: pb.ListSweepsRequest, context: Context
    ) -> pb.ListSweepsResponse:
        """One page of a project's sweeps."""
        sweeps, token = await self._sweeps.page(
            request.parent, request.page_size, request.page_token
        )
        return pb.ListSweepsResponse(
            sweeps=[convert.sweep_to_pb(sweep) for sweep in sweeps], next_page_token=token
        )

    async def CancelSweep(
        self, request: pb.CancelSweepRequest, context: Context
    ) -> pb.CancelSweepResponse:
        """Ends a sweep."""
        sweep = await self._sweeps.cancel(request.name)
        return pb.CancelSweepResponse(sweep=convert.sweep_to_pb(sweep))
