"""RewardService over a Registry: convert, one call, convert."""

# ruff: noqa: N802, ARG002 - gRPC names the methods and says what they take

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rollmesh import convert
from rollmesh.api.reward.v1 import reward_service_pb2 as pb
from rollmesh.api.reward.v1.reward_service_pb2_grpc import RewardServiceServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    import grpc

    from rollmesh import chat
    from services.reward.registry import Registry

    Context = grpc.aio.ServicerContext[Any, Any]


class RewardServicer(RewardServiceServicer):
    """RewardService. `environments`: how those are that the service knows."""

    def __init__(
        self,
        registry: Registry,
        environments: Callable[[], Sequence[chat.EnvironmentStatus]] = tuple,
    ) -> None:
        self._registry = registry
        self._environments = environments

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Scores a batch."""
        parameters = convert.struct_from_pb(request.parameters)
        items = convert.score_items_from_pb(request.items)
        return pb.ScoreResponse(
            rewards=await self._registry.score(request.function, parameters, items)
        )

    async def ListEnvironments(
        self, request: pb.ListEnvironmentsRequest, context: Context
    ) -> pb.ListEnvironmentsResponse:
        """The environments, and how they are."""
        return pb.ListEnvironmentsResponse(
            environments=map(convert.environment_status_to_pb, self._environments())
        )

    async def ScoreEach(  # type: ignore[override] # it writes by itself, as grpc.aio allows
        self, request_iterator: AsyncIterator[pb.ScoreEachRequest], context: Context
    ) -> None:
        """Scores a batch, each item for itself."""
        await self._registry.score_each(
            convert.score_each_requests_from_pb(request_iterator),
            lambda said: context.write(convert.score_each_response_to_pb(said)),
        )

    async def ListFunctions(
        self, request: pb.ListFunctionsRequest, context: Context
    ) -> pb.ListFunctionsResponse:
        """The functions that exist."""
        functions = [pb.RewardFunction(**asdict(info)) for info in self._registry.list_functions()]
        return pb.ListFunctionsResponse(functions=functions)
