"""KeyService over Keys."""

# ruff: noqa: N802, ARG002 - gRPC names the methods and says what they take

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rollmesh import convert
from rollmesh.api.coordinator.v1 import key_service_pb2 as pb
from rollmesh.api.coordinator.v1.key_service_pb2_grpc import KeyServiceServicer

if TYPE_CHECKING:
    import grpc

    from services.coordinator.keys import Keys

    Context = grpc.aio.ServicerContext[Any, Any]


class KeyServicer(KeyServiceServicer):
    """KeyService."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    async def CreateKey(
        self, request: pb.CreateKeyRequest, context: Context
    ) -> pb.CreateKeyResponse:
        """Makes a key."""
        key, secret = await self._keys.create(request.parent, request.note)
        return pb.CreateKeyResponse(key=convert.key_to_pb(key), secret=secret)

    async def ListKeys(self, request: pb.ListKeysRequest, context: Context) -> pb.ListKeysResponse:
        """The keys of a project."""
        keys = await self._keys.of_project(request.parent)
        return pb.ListKeysResponse(keys=[convert.key_to_pb(key) for key in keys])

    async def DeleteKey(
        self, request: pb.DeleteKeyRequest, context: Context
    ) -> pb.DeleteKeyResponse:
        """Deletes a key."""
        await self._keys.delete(request.name)
        return pb.DeleteKeyResponse()

    async def FindKey(self, request: pb.FindKeyRequest, context: Context) -> pb.FindKeyResponse:
        """The key of a secret."""
        key = await self._keys.find(request.secret)
        return pb.FindKeyResponse(key=convert.key_to_pb(key))
