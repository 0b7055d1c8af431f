"""Client of KeyService."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh import convert
from rollmesh.api.coordinator.v1 import key_service_pb2 as pb
from rollmesh.api.coordinator.v1.key_service_pb2_grpc import KeyServiceStub
from rollmesh.rpc.status import mesh_errors

if TYPE_CHECKING:
    import grpc

    from rollmesh import types
    from rollmesh.api.coordinator.v1.key_service_pb2_grpc import KeyServiceAsyncStub


class KeyClient:
    """KeyService, typed. Every method raises the MeshError that the coordinator raised."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: KeyServiceAsyncStub = KeyServiceStub(channel)

    async def create(self, project: str, note: str = "") -> tuple[types.Key, str]:
        """Make a key of a project, projects/{p}: the key, and its secret, which nobody keeps."""
        request = pb.CreateKeyRequest(parent=project, note=note)
        with mesh_errors():
            response = await self._stub.CreateKey(request)
        return convert.key_from_pb(response.key), response.secret

    async def list(self, project: str) -> list[types.Key]:
        """The keys of a project, the oldest first."""
        with mesh_errors():
            response = await self._stub.ListKeys(pb.ListKeysRequest(parent=project))
        return [convert.key_from_pb(key) for key in response.keys]

    async def delete(self, name: str) -> None:
        """Delete a key: its secret lets nobody in any more. NotFound: there is none."""
        with mesh_errors():
            await self._stub.DeleteKey(pb.DeleteKeyRequest(name=name))

    async def find(self, secret: str) -> types.Key:
        """The key that a secret is of. NotFound: of none."""
        with mesh_errors():
            response = await self._stub.FindKey(pb.FindKeyRequest(secret=secret))
        return convert.key_from_pb(response.key)
