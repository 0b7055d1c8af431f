"""TrainingService over Adapters and Checkpoints."""

# ruff: noqa: N802, ARG002 - gRPC names the methods and says what they take

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rollmesh import convert
from rollmesh.api.coordinator.v1 import training_service_pb2 as pb
from rollmesh.api.coordinator.v1.training_service_pb2_grpc import TrainingServiceServicer

if TYPE_CHECKING:
    import grpc

    from services.coordinator.adapters import Adapters
    from services.coordinator.checkpoints import Checkpoints

    Context = grpc.aio.ServicerContext[Any, Any]


class TrainingServicer(TrainingServiceServicer):
    """TrainingService: the ops of interactive clients, so of no job."""

    def __init__(self, adapters: Adapters, checkpoints: Checkpoints) -> None:
        self._adapters = adapters
        self._checkpoints = checkpoints

    async def ForwardBackward(
        self, request: pb.ForwardBackwardRequest, context: Context
    ) -> pb.ForwardBackwardResponse:
        """Loss and gradients of a batch."""
        result = await self._adapters.forward_backward(
            request.adapter,
            request.sequence,
            convert.data_from_pb(request.data),
            convert.loss_from_pb(request.loss_config),
            job="",
        )
        return pb.ForwardBackwardResponse(
            logprobs=convert.arrays_to_pb(result.logprobs), metrics=result.metrics
        )

    async def Forward(self, request: pb.ForwardRequest, context: Context) -> pb.ForwardResponse:
        """Log-probabilities of a batch, and on demand its loss."""
        result = await self._adapters.forward(
            request.adapter,
            convert.data_from_pb(request.data),
            temperature=convert.optional(request, "temperature"),
            loss_config=convert.optional_loss_from_pb(request),
        )
        return pb.ForwardResponse(
            logprobs=convert.arrays_to_pb(result.logprobs), metrics=result.metrics
        )

    async def OptimStep(
        self, request: pb.OptimStepRequest, context: Context
    ) -> pb.OptimStepResponse:
        """One AdamW step."""
        result = await self._adapters.optim_step(
            request.adapter, request.sequence, convert.adam_from_pb(request.adam), job=""
        )
        return pb.OptimStepResponse(policy_version=result.policy_version, metrics=result.metrics)

    async def LoadCheckpoint(
        self, request: pb.LoadCheckpointRequest, context: Context
    ) -> pb.LoadCheckpointResponse:
        """A checkpoint's weights in place of the adapter's."""
        result = await self._checkpoints.load_checkpoint(
            request.adapter,
            request.sequence,
            request.checkpoint,
            with_optimizer=request.with_optimizer,
        )
        return pb.LoadCheckpointResponse(policy_version=result.policy_version)
