"""SamplingService over Policies and Leases."""

# ruff: noqa: N802, ARG002 - gRPC names the methods and says what they take

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from rollmesh import convert
from rollmesh.api.coordinator.v1 import sampling_service_pb2 as pb
from rollmesh.api.coordinator.v1.sampling_service_pb2_grpc import SamplingServiceServicer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import grpc

    from services.coordinator.leases import Leases
    from services.coordinator.policies import Policies

    Context = grpc.aio.ServicerContext[Any, Any]


class SamplingServicer(SamplingServiceServicer):
    """SamplingService."""

    def __init__(self, policies: Policies, leases: Leases) -> None:
        self._policies = policies
        self._leases = leases

    async def Sample(
        self, request: pb.SampleRequest, context: Context
    ) -> AsyncGenerator[pb.SampleResponse]:
        """Draws completions and streams their tokens."""
        chunks = self._policies.sample(
            request.project,
            convert.policy_from_pb(request.policy),
            tuple(request.prompt_token_ids),
            request.num_completions,
            convert.params_from_pb(request.params),
            continue_on_newest=request.continue_on_newest,
            priority=request.priority,
        )
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield pb.SampleResponse(chunk=convert.chunk_to_pb(chunk))

    async def ComputeLogprobs(
        self, request: pb.ComputeLogprobsRequest, context: Context
    ) -> pb.ComputeLogprobsResponse:
        """Log-probabilities of given tokens."""
        result = await self._policies.compute_logprobs(
            request.project, convert.policy_from_pb(request.policy), tuple(request.token_ids)
        )
        return pb.ComputeLogprobsResponse(
            logprobs=convert.tensor_to_pb(result.logprobs), span=convert.span_to_pb(result.span)
        )

    async def CreateLease(
        self, request: pb.CreateLeaseRequest, context: Context
    ) -> pb.CreateLeaseResponse:
        """Keeps a version."""
        lease = await self._leases.create(
            request.project,
            convert.policy_from_pb(request.policy),
            ttl_s=convert.optional_duration_from_pb(request, "ttl"),
            request_id=request.request_id,
        )
        return pb.CreateLeaseResponse(lease=convert.lease_to_pb(lease))

    async def RenewLease(
        self, request: pb.RenewLeaseRequest, context: Context
    ) -> pb.RenewLeaseResponse:
        """Keeps it for longer."""
        lease = await self._leases.renew(
            request.name, ttl_s=convert.optional_duration_from_pb(request, "ttl")
        )
        return pb.RenewLeaseResponse(lease=convert.lease_to_pb(lease))

    async def DeleteLease(
        self, request: pb.DeleteLeaseRequest, context: Context
    ) -> pb.DeleteLeaseResponse:
        """Lets it go."""
        await self._leases.delete(request.name)
        return pb.DeleteLeaseResponse()
