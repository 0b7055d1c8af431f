"""Client of TrainingService: the training primitives of an interactive loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh import convert, types
from rollmesh.api.coordinator.v1 import training_service_pb2 as pb
from rollmesh.api.coordinator.v1.training_service_pb2_grpc import TrainingServiceStub
from rollmesh.rpc.status import mesh_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    import grpc

    from rollmesh.api.coordinator.v1.training_service_pb2_grpc import TrainingServiceAsyncStub


class TrainingClient:
    """TrainingService, typed. Every method raises the MeshError that the coordinator raised."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: TrainingServiceAsyncStub = TrainingServiceStub(channel)

    async def forward_backward(
        self,
        adapter: str,
        sequence: int,
        data: Sequence[types.Datum],
        loss_config: types.LossConfig,
    ) -> types.ForwardBackwardResult:
        """Loss and gradients of a batch, added to the adapter's pending ones."""
        request = pb.ForwardBackwardRequest(
            adapter=adapter,
            sequence=sequence,
            data=[convert.datum_to_pb(datum) for datum in data],
            loss_config=convert.loss_to_pb(loss_config),
        )
        with mesh_errors():
            response = await self._stub.ForwardBackward(request)
        return types.ForwardBackwardResult(
            convert.arrays_from_pb(response.logprobs), dict(response.metrics)
        )

    async def forward(
        self,
        adapter: str,
        data: Sequence[types.Datum],
        *,
        temperature: float | None = None,
        loss_config: types.LossConfig | None = None,
    ) -> types.ForwardResult:
        """The targets' log-probabilities at `temperature` (None: 1); of a loss its metrics too."""
        request = pb.ForwardRequest(
            adapter=adapter,
            data=[convert.datum_to_pb(datum) for datum in data],
            temperature=temperature,
            loss_config=None if loss_config is None else convert.loss_to_pb(loss_config),
        )
        with mesh_errors():
            response = await self._stub.Forward(request)
        return types.ForwardResult(
            convert.arrays_from_pb(response.logprobs), dict(response.metrics)
        )

    async def optim_step(
        self, adapter: str, sequence: int, adam: types.AdamConfig
    ) -> types.OptimStepResult:
        """One AdamW step with the pending gradients."""
        request = pb.OptimStepRequest(
            adapter=adapter, sequence=sequence, adam=convert.adam_to_pb(adam)
        )
        with mesh_errors():
            response = await self._stub.OptimStep(request)
        return types.OptimStepResult(response.policy_version, dict(response.metrics))

    async def load_checkpoint(
        self, adapter: str, sequence: int, checkpoint: str, *, with_optimizer: bool
    ) -> types.LoadResult:
        """A checkpoint's weights in place of the adapter's."""
        request = pb.LoadCheckpointRequest(
            adapter=adapter,
            sequence=sequence,
            checkpoint=checkpoint,
            with_optimizer=with_optimizer,
        )
        with mesh_errors():
            response = await self._stub.LoadCheckpoint(request)
        return types.LoadResult(response.policy_version)
