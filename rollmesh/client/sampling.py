"""Client of SamplingService."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh import convert, types
from rollmesh.api.coordinator.v1 import sampling_service_pb2 as pb
from rollmesh.api.coordinator.v1.sampling_service_pb2_grpc import SamplingServiceStub
from rollmesh.rpc.status import mesh_errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import grpc

    from rollmesh.api.coordinator.v1.sampling_service_pb2_grpc import SamplingServiceAsyncStub


class SamplingClient:
    """SamplingService, typed. Every method raises the MeshError that the coordinator raised."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: SamplingServiceAsyncStub = SamplingServiceStub(channel)

    async def stream(
        self,
        project: str,
        policy: types.PolicyRef,
        prompt_token_ids: Sequence[int],
        num_completions: int = 1,
        params: types.SamplingParams = types.SamplingParams(),
    ) -> AsyncIterator[types.CompletionChunk]:
        """The chunks of all completions as they come. Closing the iterator stops the generation."""
        request = pb.SampleRequest(
            project=project,
            policy=convert.policy_to_pb(policy),
            prompt_token_ids=prompt_token_ids,
            num_completions=num_completions,
            params=convert.params_to_pb(params),
        )
        with mesh_errors():
            call = self._stub.Sample(request)
            try:
                async for response in call:
                    yield convert.chunk_from_pb(response.chunk)
            finally:
                call.cancel()

    async def sample(
        self,
        project: str,
        policy: types.PolicyRef,
        prompt_token_ids: Sequence[int],
        num_completions: int = 1,
        params: types.SamplingParams = types.SamplingParams(),
    ) -> list[types.Completion]:
        """Whole completions, by index."""
        chunks: list[list[types.CompletionChunk]] = [[] for _ in range(num_completions)]
        async for chunk in self.stream(project, policy, prompt_token_ids, num_completions, params):
            chunks[chunk.index].append(chunk)
        return [types.join_chunks(parts) for parts in chunks]

    async def compute_logprobs(
        self, project: str, policy: types.PolicyRef, token_ids: Sequence[int]
    ) -> types.Logprobs:
        """Log-probability of each token given those before it; the first is NaN."""
        request = pb.ComputeLogprobsRequest(
            project=project, policy=convert.policy_to_pb(policy), token_ids=token_ids
        )
        with mesh_errors():
            response = await self._stub.ComputeLogprobs(request)
        return convert.logprobs_from_pb(response)
