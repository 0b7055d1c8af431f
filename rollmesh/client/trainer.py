"""Client of a trainer: inside the mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh import convert, types
from rollmesh.api.trainer.v1 import trainer_service_pb2 as pb
from rollmesh.api.trainer.v1.trainer_service_pb2_grpc import TrainerServiceStub
from rollmesh.rpc.status import mesh_errors

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    import grpc

    from rollmesh.api.trainer.v1.trainer_service_pb2_grpc import TrainerServiceAsyncStub


class TrainerClient:
    """TrainerService, typed. Every method raises the MeshError that the trainer raised."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: TrainerServiceAsyncStub = TrainerServiceStub(channel)

    async def get_trainer(self) -> types.TrainerInfo:
        """What the trainer serves and how full it is."""
        with mesh_errors():
            return convert.trainer_info_from_pb(await self._stub.GetTrainer(pb.GetTrainerRequest()))

    async def create_adapter(
        self,
        name: str,
        lora: types.LoraConfig | None,
        *,
        epoch: int,
        fork_of: types.Snapshot | None = None,
        with_optimizer: bool = False,
    ) -> types.TrainerAdapter:
        """A fresh adapter, or one with a snapshot's shape and weights; or that which is held."""
        request = pb.CreateAdapterRequest(
            name=name,
            lora=None if lora is None else convert.lora_to_pb(lora),
            epoch=epoch,
            fork_of=None if fork_of is None else convert.snapshot_to_pb(fork_of),
            with_optimizer=with_optimizer,
        )
        with mesh_errors():
            response = await self._stub.CreateAdapter(request)
        return convert.trainer_adapter_from_pb(response.adapter)

    async def restore_adapter(
        self, name: str, snapshot: types.Snapshot, *, epoch: int
    ) -> types.TrainerAdapter:
        """The adapter as its snapshot has it, or as it is held under this epoch."""
        request = pb.RestoreAdapterRequest(
            name=name, epoch=epoch, snapshot=convert.snapshot_to_pb(snapshot)
        )
        with mesh_errors():
            response = await self._stub.RestoreAdapter(request)
        return convert.trainer_adapter_from_pb(response.adapter)

    async def get_adapter(self, name: str) -> types.TrainerAdapter:
        """One adapter."""
        with mesh_errors():
            response = await self._stub.GetAdapter(pb.GetAdapterRequest(name=name))
        return convert.trainer_adapter_from_pb(response.adapter)

    async def delete_adapter(self, name: str, *, epoch: int) -> None:
        """Free an adapter and its versions."""
        with mesh_errors():
            await self._stub.DeleteAdapter(pb.DeleteAdapterRequest(name=name, epoch=epoch))

    async def forward_backward(
        self,
        adapter: str,
        sequence: int,
        data: Sequence[types.Datum],
        loss_config: types.LossConfig,
        *,
        epoch: int,
    ) -> types.ForwardBackwardResult:
        """Loss and gradients of a batch, added to the adapter's pending ones."""
        request = pb.ForwardBackwardRequest(
            adapter=adapter,
            sequence=sequence,
            data=[convert.datum_to_pb(datum) for datum in data],
            loss_config=convert.loss_to_pb(loss_config),
            epoch=epoch,
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
        self, adapter: str, sequence: int, adam: types.AdamConfig, *, epoch: int
    ) -> types.OptimStepResult:
        """One AdamW step with the pending gradients."""
        request = pb.OptimStepRequest(
            adapter=adapter, sequence=sequence, adam=convert.adam_to_pb(adam), epoch=epoch
        )
        with mesh_errors():
            response = await self._stub.OptimStep(request)
        return types.OptimStepResult(response.policy_version, dict(response.metrics))

    async def load_snapshot(
        self,
        adapter: str,
        sequence: int,
        snapshot: types.Snapshot,
        *,
        with_optimizer: bool,
        epoch: int,
    ) -> types.LoadResult:
        """Another's weights in place of the adapter's."""
        request = pb.LoadSnapshotRequest(
            adapter=adapter,
            sequence=sequence,
            snapshot=convert.snapshot_to_pb(snapshot),
            with_optimizer=with_optimizer,
            epoch=epoch,
        )
        with mesh_errors():
            response = await self._stub.LoadSnapshot(request)
        return types.LoadResult(response.policy_version)

    async def snapshot_adapter(self, name: str, *, epoch: int) -> types.Snapshot:
        """The adapter as its newest op left it, durable in the blob store."""
        with mesh_errors():
            response = await self._stub.SnapshotAdapter(
                pb.SnapshotAdapterRequest(name=name, epoch=epoch)
            )
        return convert.snapshot_from_pb(response.snapshot)

    async def publish_adapter(
        self, name: str, *, epoch: int, with_pending_gradients: bool = False
    ) -> types.PublishedVersion:
        """Make the current weights an exportable version; gradients that are pending stay so."""
        request = pb.PublishAdapterRequest(
            name=name, epoch=epoch, with_pending_gradients=with_pending_gradients
        )
        with mesh_errors():
            response = await self._stub.PublishAdapter(request)
        return types.PublishedVersion(response.policy_version, response.digest, response.export_key)

    async def export_adapter(
        self, name: str, policy_version: int, *, offset: int = 0
    ) -> AsyncGenerator[types.AdapterExport | bytes | str]:
        """A header, then chunks of adapter_model.safetensors from `offset` on, then the digest."""
        request = pb.ExportAdapterRequest(name=name, policy_version=policy_version, offset=offset)
        with mesh_errors():
            call = self._stub.ExportAdapter(request)
            try:
                async for response in call:
                    yield convert.export_part_from_pb(response)
            finally:
                call.cancel()
