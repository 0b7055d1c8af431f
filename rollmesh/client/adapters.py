"""Client of AdapterService."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from rollmesh import convert, types
from rollmesh.api.coordinator.v1 import adapter_service_pb2 as pb
from rollmesh.api.coordinator.v1.adapter_service_pb2_grpc import AdapterServiceStub
from rollmesh.rpc.status import mesh_errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from rollmesh.api.coordinator.v1.adapter_service_pb2_grpc import AdapterServiceAsyncStub


class AdapterClient:
    """AdapterService, typed. Every method raises the MeshError that the coordinator raised."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: AdapterServiceAsyncStub = AdapterServiceStub(channel)

    async def create(
        self,
        name: str,
        base_model: str,
        lora: types.LoraConfig,
        request_id: str | None = None,
        *,
        idle_ttl_s: float | None = None,
    ) -> types.Adapter:
        """A fresh adapter on a trainer of its base model."""
        request = pb.CreateAdapterRequest(
            request_id=request_id or str(uuid.uuid4()),
            name=name,
            base_model=base_model,
            lora=convert.lora_to_pb(lora),
            idle_ttl=None if idle_ttl_s is None else convert.duration_to_pb(idle_ttl_s),
        )
        with mesh_errors():
            return convert.adapter_from_pb((await self._stub.CreateAdapter(request)).adapter)

    async def fork(
        self,
        name: str,
        checkpoint: str,
        request_id: str | None = None,
        *,
        with_optimizer: bool = False,
        idle_ttl_s: float | None = None,
    ) -> types.Adapter:
        """A new adapter with the weights of a checkpoint of the same project."""
        request = pb.ForkAdapterRequest(
            request_id=request_id or str(uuid.uuid4()),
            name=name,
            checkpoint=checkpoint,
            with_optimizer=with_optimizer,
            idle_ttl=None if idle_ttl_s is None else convert.duration_to_pb(idle_ttl_s),
        )
        with mesh_errors():
            return convert.adapter_from_pb((await self._stub.ForkAdapter(request)).adapter)

    async def get(self, name: str) -> types.Adapter:
        """One adapter."""
        request = pb.GetAdapterRequest(name=name)
        with mesh_errors():
            return convert.adapter_from_pb((await self._stub.GetAdapter(request)).adapter)

    async def list(self, parent: str) -> AsyncIterator[types.Adapter]:
        """All adapters of a project, by name."""
        request = pb.ListAdaptersRequest(parent=parent)
        while True:
            with mesh_errors():
                response = await self._stub.ListAdapters(request)
            for message in response.adapters:
                yield convert.adapter_from_pb(message)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def keep_idle(self, name: str, idle_ttl_s: float | None) -> None:
        """Keep an adapter for so many seconds from now or a later use on; None: for ever."""
        idle_ttl = None if idle_ttl_s is None else convert.duration_to_pb(idle_ttl_s)
        with mesh_errors():
            await self._stub.UpdateAdapter(pb.UpdateAdapterRequest(name=name, idle_ttl=idle_ttl))

    async def delete(self, name: str, request_id: str | None = None) -> None:
        """Delete an adapter with all its versions."""
        request = pb.DeleteAdapterRequest(request_id=request_id or str(uuid.uuid4()), name=name)
        with mesh_errors():
            await self._stub.DeleteAdapter(request)

    async def publish(
        self, name: str, *, with_pending_gradients: bool = False
    ) -> types.PublishedVersion:
        """Make the current weights a version that can be sampled and exported.

        Also `with_pending_gradients`, which stay pending and are no part of it.
        """
        request = pb.PublishAdapterRequest(name=name, with_pending_gradients=with_pending_gradients)
        with mesh_errors():
            response = await self._stub.PublishAdapter(request)
        return types.PublishedVersion(response.policy.policy_version, response.digest)

    async def export(
        self, name: str, policy_version: int | None = None
    ) -> AsyncIterator[types.AdapterExport | bytes | str]:
        """A header, then chunks of adapter_model.safetensors, then the digest."""
        request = pb.ExportAdapterRequest(name=name, policy_version=policy_version)
        with mesh_errors():
            async for response in self._stub.ExportAdapter(request):
                yield convert.export_part_from_pb(response)
