"""TrainerService over the adapters: convert, one call, convert."""

# ruff: noqa: N802, ARG002 - gRPC names the methods and says what they take

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rollmesh import convert
from rollmesh.api.common.v1.export_pb2 import AdapterExportTrailer
from rollmesh.api.trainer.v1 import trainer_service_pb2 as pb
from rollmesh.api.trainer.v1.trainer_service_pb2_grpc import TrainerServiceServicer
from rollmesh.rpc.channel import EXPORT_CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from services.trainer.adapters import Adapters

    Context = grpc.aio.ServicerContext[Any, Any]


class TrainerServicer(TrainerServiceServicer):
    """TrainerService."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters

    async def GetTrainer(
        self, request: pb.GetTrainerRequest, context: Context
    ) -> pb.GetTrainerResponse:
        """What this trainer serves."""
        return convert.trainer_info_to_pb(self._adapters.info())

    async def CreateAdapter(
        self, request: pb.CreateAdapterRequest, context: Context
    ) -> pb.CreateAdapterResponse:
        """Makes an adapter, fresh or of a snapshot's weights."""
        adapter = await self._adapters.create(
            request.name,
            convert.optional_lora_from_pb(request, "lora"),
            epoch=request.epoch,
            fork_of=convert.optional_snapshot_from_pb(request, "fork_of"),
            with_optimizer=request.with_optimizer,
        )
        return pb.CreateAdapterResponse(adapter=convert.trainer_adapter_to_pb(adapter))

    async def RestoreAdapter(
        self, request: pb.RestoreAdapterRequest, context: Context
    ) -> pb.RestoreAdapterResponse:
        """Takes over an adapter from its snapshot."""
        snapshot = convert.snapshot_from_pb(request.snapshot)
        adapter = await self._adapters.restore(request.name, snapshot, epoch=request.epoch)
        return pb.RestoreAdapterResponse(adapter=convert.trainer_adapter_to_pb(adapter))

    async def GetAdapter(
        self, request: pb.GetAdapterRequest, context: Context
    ) -> pb.GetAdapterResponse:
        """One adapter."""
        adapter = self._adapters.view(request.name)
        return pb.GetAdapterResponse(adapter=convert.trainer_adapter_to_pb(adapter))

    async def DeleteAdapter(
        self, request: pb.DeleteAdapterRequest, context: Context
    ) -> pb.DeleteAdapterResponse:
        """Frees an adapter."""
        self._adapters.delete(request.name, epoch=request.epoch)
        return pb.DeleteAdapterResponse()

    async def ForwardBackward(
        self, request: pb.ForwardBackwardRequest, context: Context
    ) -> pb.ForwardBackwardResponse:
        """Loss and gradients of a batch."""
        result = await self._adapters.get(request.adapter).forward_backward(
            request.epoch,
            request.sequence,
            convert.data_from_pb(request.data),
            convert.loss_from_pb(request.loss_config),
        )
        logprobs = convert.arrays_to_pb(result.logprobs)
        return pb.ForwardBackwardResponse(logprobs=logprobs, metrics=result.metrics)

    async def Forward(self, request: pb.ForwardRequest, context: Context) -> pb.ForwardResponse:
        """Log-probabilities of a batch, and on demand its loss."""
        result = await self._adapters.get(request.adapter).forward(
            convert.data_from_pb(request.data),
            convert.optional(request, "temperature"),
            convert.optional_loss_from_pb(request),
        )
        logprobs = convert.arrays_to_pb(result.logprobs)
        return pb.ForwardResponse(logprobs=logprobs, metrics=result.metrics)

    async def OptimStep(
        self, request: pb.OptimStepRequest, context: Context
    ) -> pb.OptimStepResponse:
        """One AdamW step."""
        adam = convert.adam_from_pb(request.adam)
        result = await self._adapters.get(request.adapter).optim_step(
            request.epoch, request.sequence, adam
        )
        return pb.OptimStepResponse(policy_version=result.policy_version, metrics=result.metrics)

    async def LoadSnapshot(
        self, request: pb.LoadSnapshotRequest, context: Context
    ) -> pb.LoadSnapshotResponse:
        """Replaces the weights by a snapshot's."""
        result = await self._adapters.get(request.adapter).load_snapshot(
            request.epoch,
            request.sequence,
            convert.snapshot_from_pb(request.snapshot),
            with_optimizer=request.with_optimizer,
        )
        return pb.LoadSnapshotResponse(policy_version=result.policy_version)

    async def SnapshotAdapter(
        self, request: pb.SnapshotAdapterRequest, context: Context
    ) -> pb.SnapshotAdapterResponse:
        """Writes an adapter to the blob store."""
        snapshot = await self._adapters.get(request.name).snapshot(request.epoch)
        return pb.SnapshotAdapterResponse(snapshot=convert.snapshot_to_pb(snapshot))

    async def PublishAdapter(
        self, request: pb.PublishAdapterRequest, context: Context
    ) -> pb.PublishAdapterResponse:
        """Makes the current weights an exportable version."""
        published = await self._adapters.get(request.name).publish(
            request.epoch, with_pending_gradients=request.with_pending_gradients
        )
        return pb.PublishAdapterResponse(
            policy_version=published.policy_version,
            digest=published.digest,
            export_key=published.export_key,
        )

    async def ExportAdapter(
        self, request: pb.ExportAdapterRequest, context: Context
    ) -> AsyncIterator[pb.ExportAdapterResponse]:
        """Streams a published version."""
        version = self._adapters.version(request.name, request.policy_version)
        chunks = version.chunks(EXPORT_CHUNK_BYTES, offset=request.offset)
        yield pb.ExportAdapterResponse(header=convert.export_header_to_pb(version.header))
        for chunk in chunks:
            yield pb.ExportAdapterResponse(chunk=chunk)
        yield pb.ExportAdapterResponse(trailer=AdapterExportTrailer(digest=version.digest))
