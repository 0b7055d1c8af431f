"""Client of the reward service: inside the mesh."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from rollmesh import chat, convert, types
from rollmesh.api.reward.v1 import reward_service_pb2 as pb
from rollmesh.api.reward.v1.reward_service_pb2_grpc import RewardServiceStub
from rollmesh.errors import InternalError
from rollmesh.rpc.channel import trace_metadata
from rollmesh.rpc.status import mesh_errors
from rollmesh.rpc.streams import receive, send

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    import grpc

    from rollmesh.api.reward.v1.reward_service_pb2_grpc import RewardServiceAsyncStub


class RewardClient:
    """RewardService, typed. Every method raises the MeshError that the service raised."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: RewardServiceAsyncStub = RewardServiceStub(channel)

    async def score(
        self, function: str, parameters: Mapping[str, Any], items: Sequence[types.ScoreItem]
    ) -> list[float]:
        """The rewards of `items`, in order."""
        request = _batch(function, parameters, items)
        with mesh_errors():
            return list((await self._stub.Score(request)).rewards)

    async def score_each(
        self,
        function: str,
        parameters: Mapping[str, Any],
        items: Sequence[types.ScoreItem],
        *,
        judge: Callable[[chat.Question], Awaitable[str]],
    ) -> list[chat.ItemScore]:
        """What `items` are worth, in order; `judge` says what a function wants to hear of one.

        Raises:
            MeshError: as the service says, or the first that `judge` raises.
        """
        scores: dict[int, chat.ItemScore] = {}
        call = self._stub.ScoreEach(metadata=trace_metadata())
        writing = asyncio.Lock()

        async def write(request: pb.ScoreEachRequest) -> None:
            async with writing:  # One at a time, as gRPC wants it.
                await send(call, request)

        async def answer(question: chat.Question) -> None:
            text = await judge(question)
            await write(pb.ScoreEachRequest(answer=pb.Answer(question=question.number, text=text)))

        async def read(tasks: asyncio.TaskGroup) -> None:
            await write(pb.ScoreEachRequest(batch=_batch(function, parameters, items)))
            while (response := await receive(call)) is not None:
                if response.HasField("question"):
                    tasks.create_task(answer(convert.question_from_pb(response.question)))
                else:
                    score = convert.item_score_from_pb(response.score)
                    scores[score.index] = score

        try:
            with mesh_errors():
                try:
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(read(tasks))
                except BaseExceptionGroup as failures:
                    raise failures.exceptions[0] from None
        finally:
            call.cancel()
        if sorted(scores) != list(range(len(items))):
            raise InternalError(f"the reward service scored {len(scores)} of {len(items)} items")
        return [scores[index] for index in range(len(items))]

    async def list_environments(self) -> list[chat.EnvironmentStatus]:
        """The environments that the service knows, by name, and how they are."""
        with mesh_errors():
            response = await self._stub.ListEnvironments(pb.ListEnvironmentsRequest())
        return [convert.environment_status_from_pb(status) for status in response.environments]

    async def list_functions(self) -> list[types.RewardFunctionInfo]:
        """The functions that exist, by name."""
        with mesh_errors():
            response = await self._stub.ListFunctions(pb.ListFunctionsRequest())
        return [
            types.RewardFunctionInfo(
                info.name, info.description, info.parameters_schema_json, info.asks_judge
            )
            for info in response.functions
        ]


def _batch(
    function: str, parameters: Mapping[str, Any], items: Sequence[types.ScoreItem]
) -> pb.ScoreRequest:
    return pb.ScoreRequest(
        function=function,
        parameters=convert.struct_to_pb(parameters),
        items=convert.score_items_to_pb(items),
    )
