"""What answers calls of a coordinator: the leader's services, and until it leads a way to it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NoReturn, cast

import grpc

from rollmesh.errors import NotLeader
from services.coordinator.servicers import SERVICES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from rollmesh.rpc.server import Serving
    from services.coordinator.servicers import Register


class Door(grpc.GenericRpcHandler):
    """Answers SERVICES; with UNAVAILABLE and the leader's address while nothing is behind it."""

    def __init__(self) -> None:
        self._leader = ""
        self._behind = _Handlers()

    def register(self, server: grpc.aio.Server) -> None:
        """Add it to `server`."""
        server.add_generic_rpc_handlers((self,))

    def follow(self, leader: str) -> None:
        """Send callers to `leader`, host:port; "": nobody leads."""
        self._leader = leader

    @contextlib.asynccontextmanager
    async def opened(
        self, register: Register, *, server: Serving, drain_s: float
    ) -> AsyncIterator[Serving]:
        """What `register` adds answers on `server`, which ends with the block."""
        register(cast("grpc.aio.Server", self._behind))
        try:
            yield server
        finally:
            await server.stop(drain_s)

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of a call."""
        if handler_call_details.method.split("/")[1] not in SERVICES:
            return None
        if self._behind.handlers:
            return self._behind.find(handler_call_details)
        return grpc.unary_unary_rpc_method_handler(self._refuse)

    async def _refuse(self, _request: bytes, _context: object) -> NoReturn:
        where = f"{self._leader} does" if self._leader else "nobody does at the moment"
        raise NotLeader(f"this coordinator does not lead; {where}", leader=self._leader)


class _Handlers:
    """Takes the part of a server that services are added to."""

    def __init__(self) -> None:
        self.handlers: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self.handlers.extend(handlers)

    def add_registered_method_handlers(self, _service: str, _methods: object) -> None:
        """The same once more, for servers that look methods up beforehand."""

    def find(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        found = (handler.service(details) for handler in self.handlers)
        return next((handler for handler in found if handler is not None), None)
