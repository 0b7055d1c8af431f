"""Client of FutureService."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh.api.coordinator.v1 import future_service_pb2 as pb
from rollmesh.api.coordinator.v1.future_service_pb2_grpc import FutureServiceStub
from rollmesh.convert.values import duration_to_pb
from rollmesh.rpc.status import mesh_errors

if TYPE_CHECKING:
    import grpc

    from rollmesh.api.coordinator.v1.future_service_pb2_grpc import FutureServiceAsyncStub


class FutureClient:
    """FutureService. Every method raises the MeshError that the coordinator raised.

    Work and its results are the messages of the contract: whoever uses this speaks them already.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: FutureServiceAsyncStub = FutureServiceStub(channel)

    async def create(
        self, name: str, work: pb.Work, *, queue: str = "", position: int = 0, group: str = ""
    ) -> pb.Future:
        """Have work done later; a repeat answers the same future."""
        request = pb.CreateFutureRequest(
            name=name, queue=queue, position=position, work=work, group=group
        )
        with mesh_errors():
            response = await self._stub.CreateFuture(request)
        return response.future

    async def wait(self, name: str, timeout_s: float | None = None) -> pb.Future:
        """The future once it is done, or as it is after `timeout_s`; None: the server's default."""
        request = pb.WaitFutureRequest(
            name=name, timeout=None if timeout_s is None else duration_to_pb(timeout_s)
        )
        with mesh_errors():
            response = await self._stub.WaitFuture(request)
        return response.future

    async def wait_many(
        self, project: str, group: str, after: int = 0, timeout_s: float | None = None
    ) -> tuple[list[tuple[str, bool]], int]:
        """Name, and whether it failed, of each sample of a group that is done since `after`.

        And the cursor, which the next call passes as `after`. Empty: none within `timeout_s`.
        """
        request = pb.WaitFuturesRequest(
            project=project,
            group=group,
            after=after,
            timeout=None if timeout_s is None else duration_to_pb(timeout_s),
        )
        with mesh_errors():
            response = await self._stub.WaitFutures(request)
        return [(done.name, done.failed) for done in response.done], response.cursor

    async def cancel(self, name: str) -> None:
        """Stop a future of sampling; one that is done stays as it is."""
        with mesh_errors():
            await self._stub.CancelFuture(pb.CancelFutureRequest(name=name))
