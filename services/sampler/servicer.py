"""SamplerService over a Sampler: convert, one call, convert."""

# ruff: noqa: N802, ARG002 - gRPC names the methods and says what they take

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from rollmesh import convert
from rollmesh.api.sampler.v1 import sampler_service_pb2 as pb
from rollmesh.api.sampler.v1.sampler_service_pb2_grpc import SamplerServiceServicer
from rollmesh.convert.values import optional

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import grpc

    from rollmesh.types import CompletionChunk
    from services.sampler.engine import Sampler

    Context = grpc.aio.ServicerContext[Any, Any]


class SamplerServicer(SamplerServiceServicer):
    """SamplerService."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    async def GetSampler(
        self, request: pb.GetSamplerRequest, context: Context
    ) -> pb.GetSamplerResponse:
        """What this sampler serves and how busy it is."""
        return convert.sampler_info_to_pb(await self._sampler.get_sampler())

    async def LoadAdapter(
        self, request: pb.LoadAdapterRequest, context: Context
    ) -> pb.LoadAdapterResponse:
        """Makes a version live."""
        times = await self._sampler.load_adapter(convert.source_from_pb(request.source))
        return pb.LoadAdapterResponse(pull_s=times.pull_s, load_s=times.load_s)

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: Context
    ) -> pb.UnloadAdapterResponse:
        """Unloads a version, or all of an adapter."""
        await self._sampler.unload_adapter(request.adapter, optional(request, "policy_version"))
        return pb.UnloadAdapterResponse()

    async def Sample(
        self, request: pb.SampleRequest, context: Context
    ) -> AsyncGenerator[pb.SampleResponse]:
        """Draws completions."""
        chunks = self._sampler.sample(
            request.project,
            convert.optional_source_from_pb(request),
            request.prompt_token_ids,
            request.num_completions,
            convert.params_from_pb(request.params),
            convert.continuations_from_pb(request.continuations),
        )
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield _sample_response(chunk)

    async def ComputeLogprobs(
        self, request: pb.ComputeLogprobsRequest, context: Context
    ) -> pb.ComputeLogprobsResponse:
        """Log-probabilities of given tokens."""
        return convert.logprobs_to_pb(
            await self._sampler.compute_logprobs(
                request.project, convert.optional_source_from_pb(request), request.token_ids
            )
        )


def _sample_response(chunk: CompletionChunk | None) -> pb.SampleResponse:
    """One without a chunk is a sign of life."""
    return pb.SampleResponse(chunk=None if chunk is None else convert.chunk_to_pb(chunk))
