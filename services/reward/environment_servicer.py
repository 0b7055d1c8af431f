"""EnvironmentService over a Router: convert, one call, convert."""

# ruff: noqa: N802, ARG002 - gRPC names the methods and says what they take

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rollmesh import convert
from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.api.environment.v1.environment_service_pb2_grpc import EnvironmentServiceServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from services.reward.environments.router import Router

    Context = grpc.aio.ServicerContext[Any, Any]

SERVICE = pb.DESCRIPTOR.services_by_name["EnvironmentService"].full_name


class EnvironmentServicer(EnvironmentServiceServicer):
    """EnvironmentService, of every environment that the reward service knows."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        """The environments that take work, by the names that jobs use."""
        return pb.DescribeResponse(
            environments=map(convert.environment_to_pb, self._router.describe())
        )

    async def ListTasks(
        self, request: pb.ListTasksRequest, context: Context
    ) -> pb.ListTasksResponse:
        """Tasks of a split."""
        tasks, next_page_token = await self._router.list_tasks(
            request.environment,
            request.split,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListTasksResponse(
            tasks=map(convert.task_to_pb, tasks), next_page_token=next_page_token
        )

    async def GetTask(self, request: pb.GetTaskRequest, context: Context) -> pb.GetTaskResponse:
        """One task."""
        task = await self._router.get_task(request.environment, request.task_id)
        return pb.GetTaskResponse(task=convert.task_to_pb(task))

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Scores a batch."""
        items = [
            convert.answered_from_pb(item, field=f"items[{index}]")
            for index, item in enumerate(request.items)
        ]
        scored = await self._router.score(request.environment, items)
        return pb.ScoreResponse(scored=map(convert.scored_to_pb, scored))

    async def Episode(  # type: ignore[override] # it writes by itself, as grpc.aio allows
        self, request_iterator: AsyncIterator[pb.EpisodeRequest], context: Context
    ) -> None:
        """Relays one episode."""
        await self._router.play(
            (convert.episode_request_from_pb(request) async for request in request_iterator),
            lambda response: context.write(convert.response_to_pb(response)),
        )
