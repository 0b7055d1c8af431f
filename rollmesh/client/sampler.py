"""Client of a sampler: inside the mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh import convert, types
from rollmesh.api.sampler.v1 import sampler_service_pb2 as pb
from rollmesh.api.sampler.v1.sampler_service_pb2_grpc import SamplerServiceStub
from rollmesh.rpc.silence import unsilenced
from rollmesh.rpc.status import mesh_errors

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    import grpc

    from rollmesh.api.sampler.v1.sampler_service_pb2_grpc import SamplerServiceAsyncStub


class SamplerClient:
    """SamplerService, typed. Every method raises the MeshError that the sampler raised."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: SamplerServiceAsyncStub = SamplerServiceStub(channel)

    async def get_sampler(self) -> types.SamplerInfo:
        """What the sampler serves and how busy it is."""
        with mesh_errors():
            return convert.sampler_info_from_pb(await self._stub.GetSampler(pb.GetSamplerRequest()))

    async def load_adapter(self, source: types.AdapterSource) -> types.LoadTimes:
        """Return once the version is live."""
        request = pb.LoadAdapterRequest(source=convert.source_to_pb(source))
        with mesh_errors():
            response = await self._stub.LoadAdapter(request)
        return types.LoadTimes(response.pull_s, response.load_s)

    async def unload_adapter(self, adapter: str, policy_version: int | None = None) -> None:
        """Unload a version, or all of them, once no request uses it."""
        request = pb.UnloadAdapterRequest(adapter=adapter, policy_version=policy_version)
        with mesh_errors():
            await self._stub.UnloadAdapter(request)

    async def sample(
        self,
        source: types.AdapterSource | None,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        params: types.SamplingParams,
        *,
        project: str,
        continuations: Sequence[types.Continuation] = (),
    ) -> AsyncGenerator[types.CompletionChunk]:
        """The chunks of all completions, or of `continuations` alone; closing it aborts the work.

        Raises:
            Unavailable: also when the stream was silent for SILENCE_S.
        """
        request = pb.SampleRequest(
            source=convert.source_to_pb(source) if source else None,
            prompt_token_ids=prompt_token_ids,
            num_completions=num_completions,
            params=convert.params_to_pb(params),
            project=project,
            continuations=convert.continuations_to_pb(continuations),
        )
        with mesh_errors():
            call = self._stub.Sample(request)
            try:
                async for response in unsilenced(call):
                    if response.HasField("chunk"):
                        yield convert.chunk_from_pb(response.chunk)
            finally:
                call.cancel()

    async def compute_logprobs(
        self, source: types.AdapterSource | None, token_ids: Sequence[int], *, project: str
    ) -> types.Logprobs:
        """Log-probability of each token given those before it; the first is NaN."""
        request = pb.ComputeLogprobsRequest(
            source=convert.source_to_pb(source) if source else None,
            token_ids=token_ids,
            project=project,
        )
        with mesh_errors():
            response = await self._stub.ComputeLogprobs(request)
        return convert.logprobs_from_pb(response)
