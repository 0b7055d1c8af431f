"""Client of environments: of one that an author serves, or of all that a reward service knows."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from rollmesh import convert
from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.api.environment.v1.environment_service_pb2_grpc import EnvironmentServiceStub
from rollmesh.errors import EnvironmentFailed, EnvironmentTimeout, InvalidRequest
from rollmesh.rpc.channel import trace_metadata
from rollmesh.rpc.status import mesh_errors
from rollmesh.rpc.streams import receive, send

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    import grpc

    from rollmesh import chat
    from rollmesh.api.environment.v1.environment_service_pb2_grpc import (
        EnvironmentServiceAsyncStub,
    )

    Call = grpc.aio.StreamStreamCall[pb.EpisodeRequest, pb.EpisodeResponse]


class Episode:
    """One episode under way. `first` is what there is to see before any action."""

    def __init__(self, call: Call, first: chat.Response, answer_s: float | None) -> None:
        self.first = first
        self._call = call
        self._answer_s = answer_s

    async def act(self, action: chat.Message) -> chat.Response:
        """What comes of a message of the assistant.

        Raises:
            EnvironmentTimeout: it took longer than `answer_s`.
            EnvironmentFailed: the environment ended the episode without a word.
            MeshError: any other that the server raised.
        """
        request = pb.EpisodeRequest(action=convert.message_to_pb(action))
        return await _answered(self._call, request, self._answer_s)

    async def give_up(self) -> chat.Response | None:
        """What the episode was worth after all, where no more actions come; None: it does not say.

        Errors are those of `act`, but that the end may come without a word.
        """
        with mesh_errors():
            await self._call.done_writing()
        response = await _read(self._call, self._answer_s)
        return None if response is None else convert.response_from_pb(response)

    async def end(self) -> None:
        """Return once the environment has ended the stream, as it does after `done`.

        Raises:
            EnvironmentFailed: it says something more instead.
            MeshError: as of `act`.
        """
        if await _read(self._call, self._answer_s) is not None:
            raise EnvironmentFailed("the environment goes on after the end of the episode")

    def on_end(self, listener: Callable[[], None]) -> None:
        """Call `listener` when the stream is over, whoever ends it; at once where it is."""
        self._call.add_done_callback(lambda _: listener())


class EnvironmentClient:
    """EnvironmentService, typed. Every method raises the MeshError that the server raised."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: EnvironmentServiceAsyncStub = EnvironmentServiceStub(channel)

    async def describe(self) -> list[chat.EnvironmentInfo]:
        """The environments of the server."""
        with mesh_errors():
            response = await self._stub.Describe(pb.DescribeRequest())
        return [convert.environment_from_pb(each) for each in response.environments]

    async def list_tasks(
        self, environment: str, split: str, *, page_size: int = 0, page_token: str = ""
    ) -> tuple[list[chat.Task], str]:
        """Tasks of a split, and the token of the next page ("": none)."""
        request = pb.ListTasksRequest(
            environment=environment, split=split, page_size=page_size, page_token=page_token
        )
        with mesh_errors():
            response = await self._stub.ListTasks(request)
        return [_task(task) for task in response.tasks], response.next_page_token

    async def get_task(self, environment: str, task_id: str) -> chat.Task:
        """One task."""
        request = pb.GetTaskRequest(environment=environment, task_id=task_id)
        with mesh_errors():
            response = await self._stub.GetTask(request)
        return _task(response.task)

    async def score(
        self,
        environment: str,
        items: Sequence[chat.Answered],
        *,
        timeout_s: float | None = None,
    ) -> list[chat.Scored]:
        """What single-turn answers are worth, in order.

        Raises:
            EnvironmentFailed: it scored another number of items.
        """
        request = pb.ScoreRequest(
            environment=environment, items=[convert.answered_to_pb(item) for item in items]
        )
        with mesh_errors():
            response = await self._stub.Score(request, timeout=timeout_s)
        if len(response.scored) != len(items):
            raise EnvironmentFailed(
                f"the environment scored {len(response.scored)} of {len(items)} items",
                environment=environment,
            )
        return [convert.scored_from_pb(scored) for scored in response.scored]

    @contextlib.asynccontextmanager
    async def episode(
        self, environment: str, task_id: str, *, seed: int = 0, answer_s: float | None = None
    ) -> AsyncIterator[Episode]:
        """An episode that has begun; it is over when the block is left, however that happens.

        `answer_s`: seconds in which each of its answers has to come; None: any time.

        Raises:
            As Episode.act.
        """
        call = self._stub.Episode(metadata=trace_metadata())
        start = pb.Start(environment=environment, task_id=task_id, seed=seed)
        try:
            first = await _answered(call, pb.EpisodeRequest(start=start), answer_s)
            yield Episode(call, first, answer_s)
        finally:
            call.cancel()


def _task(message: pb.Task) -> chat.Task:
    try:
        return convert.task_from_pb(message)
    except InvalidRequest as error:
        raise EnvironmentFailed(str(error)) from None


async def _answered(
    call: Call, request: pb.EpisodeRequest, answer_s: float | None
) -> chat.Response:
    await send(call, request)
    response = await _read(call, answer_s)
    if response is None:
        raise EnvironmentFailed("the environment ended the episode without a response")
    return convert.response_from_pb(response)


async def _read(call: Call, answer_s: float | None) -> pb.EpisodeResponse | None:
    """The next response; None: the server has ended the stream well."""
    try:
        async with asyncio.timeout(answer_s):
            with mesh_errors():
                response: pb.EpisodeResponse | None = await receive(call)
                return response
    except TimeoutError:
        raise EnvironmentTimeout(f"the environment gave no answer within {answer_s:g} s") from None
