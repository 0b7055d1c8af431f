"""Client of CheckpointService."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from rollmesh import convert
from rollmesh.api.coordinator.v1 import checkpoint_service_pb2 as pb
from rollmesh.api.coordinator.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from rollmesh.rpc.status import mesh_errors

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    import grpc

    from rollmesh import types
    from rollmesh.api.coordinator.v1.checkpoint_service_pb2_grpc import CheckpointServiceAsyncStub


class CheckpointClient:
    """CheckpointService, typed. Every method raises the MeshError that the coordinator raised."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: CheckpointServiceAsyncStub = CheckpointServiceStub(channel)

    async def create(
        self, name: str, request_id: str | None = None, *, ttl_s: float | None = None
    ) -> types.Checkpoint:
        """Keep an adapter as it is now."""
        request = pb.CreateCheckpointRequest(
            request_id=request_id or str(uuid.uuid4()),
            name=name,
            ttl=None if ttl_s is None else convert.duration_to_pb(ttl_s),
        )
        with mesh_errors():
            response = await self._stub.CreateCheckpoint(request)
        return convert.checkpoint_from_pb(response.checkpoint)

    async def get(self, name: str) -> types.Checkpoint:
        """One checkpoint."""
        with mesh_errors():
            response = await self._stub.GetCheckpoint(pb.GetCheckpointRequest(name=name))
        return convert.checkpoint_from_pb(response.checkpoint)

    async def list(self, parent: str) -> AsyncIterator[types.Checkpoint]:
        """All checkpoints of an adapter, by name."""
        request = pb.ListCheckpointsRequest(parent=parent)
        while True:
            with mesh_errors():
                response = await self._stub.ListCheckpoints(request)
            for message in response.checkpoints:
                yield convert.checkpoint_from_pb(message)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def delete(self, name: str, request_id: str | None = None) -> None:
        """Delete a checkpoint."""
        request = pb.DeleteCheckpointRequest(request_id=request_id or str(uuid.uuid4()), name=name)
        with mesh_errors():
            await self._stub.DeleteCheckpoint(request)

    async def export(self, name: str) -> AsyncGenerator[types.AdapterExport | bytes | str]:
        """A header, then chunks of adapter_model.safetensors, then the digest."""
        with mesh_errors():
            call = self._stub.ExportCheckpoint(pb.ExportCheckpointRequest(name=name))
            try:
                async for response in call:
                    yield convert.export_part_from_pb(response)
            finally:
                call.cancel()
