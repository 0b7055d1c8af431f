"""Client of the reward service: inside the mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rollmesh import convert, types
from rollmesh.api.reward.v1 import reward_service_pb2 as pb
from rollmesh.api.reward.v1.reward_service_pb2_grpc import RewardServiceStub
from rollmesh.rpc.status import mesh_errors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
        request = pb.ScoreRequest(
            function=function,
            parameters=convert.struct_to_pb(parameters),
            items=convert.score_items_to_pb(items),
        )
        with mesh_errors():
            return list((await self._stub.Score(request)).rewards)

    async def list_functions(self) -> list[types.RewardFunctionInfo]:
        """The functions that exist, by name."""
        with mesh_errors():
            response = await self._stub.ListFunctions(pb.ListFunctionsRequest())
        return [
            types.RewardFunctionInfo(info.name, info.description, info.parameters_schema_json)
            for info in response.functions
        ]
