"""AdapterService over Adapters and Checkpoints."""

# ruff: noqa: N802, ARG002 - gRPC names the methods and says what they take

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from rollmesh import convert
from rollmesh.api.common.v1 import export_pb2, policy_pb2
from rollmesh.api.coordinator.v1 import adapter_service_pb2 as pb
from rollmesh.api.coordinator.v1.adapter_service_pb2_grpc import AdapterServiceServicer
from rollmesh.convert.values import optional

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import grpc

    from rollmesh import types
    from services.coordinator.adapters import Adapters
    from services.coordinator.checkpoints import Checkpoints

    Context = grpc.aio.ServicerContext[Any, Any]


class AdapterServicer(AdapterServiceServicer):
    """AdapterService."""

    def __init__(self, adapters: Adapters, checkpoints: Checkpoints) -> None:
        self._adapters = adapters
        self._checkpoints = checkpoints

    async def CreateAdapter(
        self, request: pb.CreateAdapterRequest, context: Context
    ) -> pb.CreateAdapterResponse:
        """Creates an adapter."""
        adapter = await self._adapters.create_adapter(
            request.name,
            request.base_model,
            convert.lora_from_pb(request.lora),
            job="",
            request_id=request.request_id,
            idle_ttl_s=convert.optional_duration_from_pb(request, "idle_ttl"),
        )
        return pb.CreateAdapterResponse(adapter=convert.adapter_to_pb(adapter))

    async def ForkAdapter(
        self, request: pb.ForkAdapterRequest, context: Context
    ) -> pb.ForkAdapterResponse:
        """Creates an adapter of a checkpoint."""
        adapter = await self._checkpoints.fork_adapter(
            request.name,
            request.checkpoint,
            with_optimizer=request.with_optimizer,
            idle_ttl_s=convert.optional_duration_from_pb(request, "idle_ttl"),
            request_id=request.request_id,
        )
        return pb.ForkAdapterResponse(adapter=convert.adapter_to_pb(adapter))

    async def GetAdapter(
        self, request: pb.GetAdapterRequest, context: Context
    ) -> pb.GetAdapterResponse:
        """One adapter."""
        adapter = await self._adapters.get_adapter(request.name)
        return pb.GetAdapterResponse(adapter=convert.adapter_to_pb(adapter))

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: Context
    ) -> pb.ListAdaptersResponse:
        """One page of a project's adapters."""
        adapters, token = await self._adapters.page(
            request.parent, request.page_size, request.page_token
        )
        return pb.ListAdaptersResponse(
            adapters=[convert.adapter_to_pb(adapter) for adapter in adapters],
            next_page_token=token,
        )

    async def UpdateAdapter(
        self, request: pb.UpdateAdapterRequest, context: Context
    ) -> pb.UpdateAdapterResponse:
        """Sets its time to live."""
        idle_ttl_s = convert.optional_duration_from_pb(request, "idle_ttl")
        await self._adapters.keep_idle(request.name, idle_ttl_s)
        return pb.UpdateAdapterResponse()

    async def DeleteAdapter(
        self, request: pb.DeleteAdapterRequest, context: Context
    ) -> pb.DeleteAdapterResponse:
        """Deletes an adapter."""
        await self._adapters.delete_adapter(request.name, request_id=request.request_id)
        return pb.DeleteAdapterResponse()

    async def PublishAdapter(
        self, request: pb.PublishAdapterRequest, context: Context
    ) -> pb.PublishAdapterResponse:
        """Makes the current weights a version."""
        version = await self._adapters.publish_adapter(
            request.name, with_pending_gradients=request.with_pending_gradients
        )
        return pb.PublishAdapterResponse(
            policy=policy_pb2.PolicyRef(
                adapter=request.name, policy_version=version.policy_version
            ),
            digest=version.digest,
        )

    async def ExportAdapter(
        self, request: pb.ExportAdapterRequest, context: Context
    ) -> AsyncGenerator[pb.ExportAdapterResponse]:
        """Streams a version."""
        version = optional(request, "policy_version")
        exported = self._adapters.export_adapter(request.name, version)
        async with contextlib.aclosing(exported) as parts:
            async for part in parts:
                yield _part_to_pb(part)


def _part_to_pb(part: types.AdapterExport | bytes | str) -> pb.ExportAdapterResponse:
    match part:
        case bytes():
            return pb.ExportAdapterResponse(chunk=part)
        case str():
            return pb.ExportAdapterResponse(trailer=export_pb2.AdapterExportTrailer(digest=part))
        case _:
            return pb.ExportAdapterResponse(header=convert.export_header_to_pb(part))
