"""Clients of grpc.health.v1: whether a server takes work."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from rollmesh.rpc.status import mesh_errors, to_error

if TYPE_CHECKING:
    import grpc


class HealthClient:
    """Health, of a server as a whole."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = health_pb2_grpc.HealthStub(channel)  # its types leave its calls out

    async def check(self) -> bool:
        """Whether it says SERVING.

        Raises:
            Unimplemented, NotFound: it does not tell its health.
            MeshError: it does not answer.
        """
        with mesh_errors():
            return _serves(await self._stub.Check(health_pb2.HealthCheckRequest()))


class HealthProbe:
    """The same, asked beside the event loop: one that is busy learns what was answered meanwhile.

    Attributes:
        num_answers: how many have come, also of those that the loop has not come to.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self.num_answers = 0
        self._stub: Any = health_pb2_grpc.HealthStub(channel)

    async def check(self) -> bool:
        """As of HealthClient."""
        come = asyncio.Event()
        call = self._stub.Check.future(health_pb2.HealthCheckRequest())
        call.add_done_callback(partial(self._has_come, asyncio.get_running_loop(), come))
        try:
            await come.wait()
        finally:
            call.cancel()
        error = call.exception()
        if error is not None:
            raise to_error(error)
        return _serves(call.result())

    def _has_come(
        self, loop: asyncio.AbstractEventLoop, come: asyncio.Event, _: grpc.Future[Any]
    ) -> None:
        self.num_answers += 1
        with contextlib.suppress(RuntimeError):  # The loop has been closed.
            loop.call_soon_threadsafe(come.set)


def _serves(response: health_pb2.HealthCheckResponse) -> bool:
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)
