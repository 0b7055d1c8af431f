"""EnvironmentService over a Host: convert, one call, convert."""

# ruff: noqa: N802, ARG002 - gRPC names the methods and says what they take

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from rollmesh import chat, convert
from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.api.environment.v1.environment_service_pb2_grpc import EnvironmentServiceServicer
from rollmesh.environment.episode import Start
from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from rollmesh.environment.host import Host

    Context = grpc.aio.ServicerContext[Any, Any]

_BREAK_S = 0.02
"""Seconds, over several turns of the event loop, in which a broken stream turns out to be one: gRPC
says that nothing more comes, as of a half-closed one, just before it cancels."""
_BREAK_TURNS = 5


class EnvironmentServicer(EnvironmentServiceServicer):
    """EnvironmentService."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        """What the server has."""
        return pb.DescribeResponse(
            environments=map(convert.environment_to_pb, self._host.describe())
        )

    async def ListTasks(
        self, request: pb.ListTasksRequest, context: Context
    ) -> pb.ListTasksResponse:
        """The tasks of a split."""
        tasks, token = self._host.list_tasks(
            request.environment, request.split, request.page_size, request.page_token
        )
        return pb.ListTasksResponse(tasks=map(convert.task_to_pb, tasks), next_page_token=token)

    async def GetTask(self, request: pb.GetTaskRequest, context: Context) -> pb.GetTaskResponse:
        """One task."""
        task = self._host.get_task(request.environment, request.task_id)
        return pb.GetTaskResponse(task=convert.task_to_pb(task))

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Single turn: what answers are worth."""
        items = [
            convert.answered_from_pb(item, field=f"items[{index}]")
            for index, item in enumerate(request.items)
        ]
        scored = await self._host.score(request.environment, items)
        return pb.ScoreResponse(scored=map(convert.scored_to_pb, scored))

    # A coroutine that reads and writes, where gRPC also takes a generator: what it awaits is all
    # that an episode is, and ends at once where the call does.
    async def Episode(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.EpisodeRequest], context: Context
    ) -> None:
        """Multi-turn: one episode."""
        await self._host.episode(_Stream(request_iterator, context))


class _Stream:
    """An episode's two directions, as a Host takes them."""

    def __init__(self, requests: AsyncIterator[pb.EpisodeRequest], context: Context) -> None:
        self._requests = requests
        self._context = context

    async def receive(self) -> Start | chat.Message | None:
        """What the client says next; None: no more."""
        request = await anext(self._requests, None)
        if request is None:
            for _ in range(_BREAK_TURNS):
                await asyncio.sleep(_BREAK_S / _BREAK_TURNS)
            return None
        return _request_from_pb(request)

    async def send(self, response: chat.Response) -> None:
        """One response."""
        await self._context.write(convert.response_to_pb(response))


def _request_from_pb(request: pb.EpisodeRequest) -> Start | chat.Message:
    match request.WhichOneof("request"):
        case "start":
            start = request.start
            return Start(start.environment, start.task_id, start.seed)
        case "action":
            action = convert.message_from_pb(request.action, field="action")
            if action.role != "assistant":
                raise InvalidRequest(
                    f"action.role: it is to be the assistant's, it is {action.role}",
                    field="action.role",
                    value=action.role,
                    allowed="assistant",
                )
            return action
        case _:
            raise InvalidRequest("request: neither start nor action is set", field="request")
