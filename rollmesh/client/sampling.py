"""Client of SamplingService."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh import convert, types
from rollmesh.api.coordinator.v1 import sampling_service_pb2 as pb
from rollmesh.api.coordinator.v1.sampling_service_pb2_grpc import SamplingServiceStub
from rollmesh.convert.values import duration_to_pb
from rollmesh.rpc.status import mesh_errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import grpc

    from rollmesh.api.coordinator.v1.sampling_service_pb2_grpc import SamplingServiceAsyncStub
    from rollmesh.job import Priority


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
        *,
        continue_on_newest: bool = False,
        priority: Priority = "normal",
    ) -> AsyncIterator[types.CompletionChunk]:
        """The chunks of all completions as they come. Closing the iterator stops the generation."""
        request = pb.SampleRequest(
            project=project,
            policy=convert.policy_to_pb(policy),
            prompt_token_ids=prompt_token_ids,
            num_completions=num_completions,
            params=convert.params_to_pb(params),
            continue_on_newest=continue_on_newest,
            priority=priority,
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
        *,
        continue_on_newest: bool = False,
        priority: Priority = "normal",
    ) -> list[types.Completion]:
        """Whole completions, by index."""
        chunks: list[list[types.CompletionChunk]] = [[] for _ in range(num_completions)]
        stream = self.stream(
            project,
            policy,
            prompt_token_ids,
            num_completions,
            params,
            continue_on_newest=continue_on_newest,
            priority=priority,
        )
        async for chunk in stream:
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

    async def create_lease(
        self,
        project: str,
        policy: types.PolicyRef,
        *,
        ttl_s: float | None = None,
        request_id: str = "",
    ) -> types.Lease:
        """Keep a version (without one: the newest) for `ttl_s` (None: the server's default)."""
        request = pb.CreateLeaseRequest(
            project=project,
            policy=convert.policy_to_pb(policy),
            ttl=None if ttl_s is None else duration_to_pb(ttl_s),
            request_id=request_id,
        )
        with mesh_errors():
            response = await self._stub.CreateLease(request)
        return convert.lease_from_pb(response.lease)

    async def renew_lease(self, name: str, *, ttl_s: float | None = None) -> types.Lease:
        """Make a lease last for `ttl_s` from now."""
        ttl = None if ttl_s is None else duration_to_pb(ttl_s)
        with mesh_errors():
            response = await self._stub.RenewLease(pb.RenewLeaseRequest(name=name, ttl=ttl))
        return convert.lease_from_pb(response.lease)

    async def delete_lease(self, name: str) -> None:
        """End a lease; one that is gone is fine too."""
        with mesh_errors():
            await self._stub.DeleteLease(pb.DeleteLeaseRequest(name=name))
