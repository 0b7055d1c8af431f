"""CheckpointService over Checkpoints."""

# ruff: noqa: N802, ARG002 - gRPC names the methods and says what they take

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from rollmesh import convert
from rollmesh.api.common.v1 import export_pb2
from rollmesh.api.coordinator.v1 import checkpoint_service_pb2 as pb
from rollmesh.api.coordinator.v1.checkpoint_service_pb2_grpc import CheckpointServiceServicer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import grpc

    from rollmesh import types
    from services.coordinator.checkpoints import Checkpoints

    Context = grpc.aio.ServicerContext[Any, Any]


class CheckpointServicer(CheckpointServiceServicer):
    """CheckpointService."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    async def CreateCheckpoint(
        self, request: pb.CreateCheckpointRequest, context: Context
    ) -> pb.CreateCheckpointResponse:
        """Keeps an adapter as it is."""
        checkpoint = await self._checkpoints.create_checkpoint(
            request.name,
            ttl_s=convert.optional_duration_from_pb(request, "ttl"),
            request_id=request.request_id,
        )
        return pb.CreateCheckpointResponse(checkpoint=convert.checkpoint_to_pb(checkpoint))

    async def GetCheckpoint(
        self, request: pb.GetCheckpointRequest, context: Context
    ) -> pb.GetCheckpointResponse:
        """One checkpoint."""
        checkpoint = await self._checkpoints.get_checkpoint(request.name)
        return pb.GetCheckpointResponse(checkpoint=convert.checkpoint_to_pb(checkpoint))

    async def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: Context
    ) -> pb.ListCheckpointsResponse:
        """One page of an adapter's checkpoints."""
        checkpoints, token = await self._checkpoints.page(
            request.parent, request.page_size, request.page_token
        )
        return pb.ListCheckpointsResponse(
            checkpoints=[convert.checkpoint_to_pb(checkpoint) for checkpoint in checkpoints],
            next_page_token=token,
        )

    async def DeleteCheckpoint(
        self, request: pb.DeleteCheckpointRequest, context: Context
    ) -> pb.DeleteCheckpointResponse:
        """Deletes a checkpoint."""
        await self._checkpoints.delete_checkpoint(request.name, request_id=request.request_id)
        return pb.DeleteCheckpointResponse()

    async def ExportCheckpoint(
        self, request: pb.ExportCheckpointRequest, context: Context
    ) -> AsyncGenerator[pb.ExportCheckpointResponse]:
        """Streams a checkpoint's weights."""
        exported = self._checkpoints.export_checkpoint(request.name)
        async with contextlib.aclosing(exported) as parts:
            async for part in parts:
                yield _part_to_pb(part)


def _part_to_pb(part: types.AdapterExport | bytes | str) -> pb.ExportCheckpointResponse:
    match part:
        case bytes():
            return pb.ExportCheckpointResponse(chunk=part)
        case str():
            return pb.ExportCheckpointResponse(trailer=export_pb2.AdapterExportTrailer(digest=part))
        case _:
            return pb.ExportCheckpointResponse(header=convert.export_header_to_pb(part))
