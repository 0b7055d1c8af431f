"""FutureService over Futures."""

# ruff: noqa: N802, ARG002 - gRPC names the methods and says what they take

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rollmesh import convert
from rollmesh.api.coordinator.v1 import future_service_pb2 as pb
from rollmesh.api.coordinator.v1.future_service_pb2_grpc import FutureServiceServicer
from services.coordinator.servicers.work import work_from_pb

if TYPE_CHECKING:
    import grpc

    from services.coordinator.future_work import FutureState
    from services.coordinator.futures import Futures

    Context = grpc.aio.ServicerContext[Any, Any]


class FutureServicer(FutureServiceServicer):
    """FutureService."""

    def __init__(self, futures: Futures) -> None:
        self._futures = futures

    async def CreateFuture(
        self, request: pb.CreateFutureRequest, context: Context
    ) -> pb.CreateFutureResponse:
        """Takes work."""
        state = await self._futures.create(
            request.name,
            work_from_pb(request.name, request.work),
            queue=request.queue,
            position=request.position,
            group=request.group,
        )
        return pb.CreateFutureResponse(future=_future_to_pb(state))

    async def WaitFuture(
        self, request: pb.WaitFutureRequest, context: Context
    ) -> pb.WaitFutureResponse:
        """Waits for one."""
        timeout_s = convert.optional_duration_from_pb(request, "timeout")
        state = await self._futures.wait(request.name, timeout_s=timeout_s)
        return pb.WaitFutureResponse(future=_future_to_pb(state))

    async def WaitFutures(
        self, request: pb.WaitFuturesRequest, context: Context
    ) -> pb.WaitFuturesResponse:
        """Waits for any of a group."""
        done = await self._futures.wait_many(
            request.project,
            request.group,
            request.after,
            timeout_s=convert.optional_duration_from_pb(request, "timeout"),
        )
        return pb.WaitFuturesResponse(
            done=[
                pb.WaitFuturesResponse.Done(name=name, failed=failed) for _, name, failed in done
            ],
            cursor=done[-1][0] if done else request.after,
        )

    async def CancelFuture(
        self, request: pb.CancelFutureRequest, context: Context
    ) -> pb.CancelFutureResponse:
        """Stops one of sampling."""
        await self._futures.cancel(request.name)
        return pb.CancelFutureResponse()


def _future_to_pb(state: FutureState) -> pb.Future:
    future = pb.Future(
        name=state.name,
        done=state.result is not None,
        create_time=convert.time_to_pb(state.create_time),
    )
    if state.waiting is not None:
        future.waiting.CopyFrom(convert.waiting_to_pb(state.waiting))
    future.MergeFromString(state.result or b"")
    return future
