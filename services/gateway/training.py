"""Training: forward_backward, optim_step, and loading into a model that there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from rollmesh.api.common.v1 import training_pb2
from rollmesh.api.coordinator.v1 import future_service_pb2 as pb
from rollmesh.api.coordinator.v1 import training_service_pb2
from rollmesh.api.tinker.v1 import tinker_pb2
from rollmesh.errors import InvalidRequest, MeshError, Unimplemented
from services.gateway.aside import aside
from services.gateway.wire import bodies
from services.gateway.wire.batches import data_of
from services.gateway.wire.ids import MAX_SEQ, ModelId
from services.gateway.wire.losses import SUBSTITUTE, config_of, loss_of
from services.gateway.wire.outputs import runs_of
from services.gateway.wire.paths import CheckpointPath

if TYPE_CHECKING:
    from services.gateway.callers import Caller
    from services.gateway.checkpoints import Checkpoints
    from services.gateway.config import GatewayConfig
    from services.gateway.queues import Queues

    Made = tuple[pb.Work, dict[str, Any]]


class Training:
    """Takes training requests at their places."""

    def __init__(self, config: GatewayConfig, queues: Queues, checkpoints: Checkpoints) -> None:
        self._config = config
        self._queues = queues
        self._checkpoints = checkpoints

    async def forward_backward(self, caller: Caller, body: bytes) -> dict[str, str]:
        """Loss and gradients of a batch, or its log-probabilities alone: the ticket."""
        try:
            parse = tinker_pb2.ForwardBackwardRequest.FromString
            request = await aside(len(body), parse, body)
        except DecodeError:
            raise InvalidRequest("body: not a ForwardBackwardRequest", field="body") from None
        model = ModelId.parse(request.model_id)
        _check_seq(request.seq_id)

        async def make() -> Made:
            return await aside(len(body), self._batch, request, model.adapter(caller.project))

        return await self._queues.put(caller, model, request.seq_id, make)

    async def refuse(self, caller: Caller, head: bytes, error: MeshError) -> dict[str, str]:
        """A forward_backward whose body is too large, of which `head` came: it fails at its place.

        Raises:
            MeshError: `error`, where not even that is known.
        """
        model_id, seq_id = _place_in(head)
        if not model_id or not seq_id:
            raise error

        async def make() -> Made:
            raise error

        return await self._queues.put(caller, ModelId.parse(model_id), seq_id, make)

    async def optim_step(self, caller: Caller, body: bytes) -> dict[str, str]:
        """One step: the ticket."""
        place = bodies.parse(bodies.Sequenced, body)
        model = ModelId.parse(place.model_id)

        async def make() -> Made:
            request = bodies.parse(bodies.OptimStep, body)
            if request.adam_params is None:
                raise Unimplemented("optimizer_params: this mesh has adamw, of adam_params")
            adam = request.adam_params
            step = training_service_pb2.OptimStepRequest(
                adapter=model.adapter(caller.project),
                adam=training_pb2.AdamConfig(
                    learning_rate=adam.learning_rate,
                    beta1=adam.beta1,
                    beta2=adam.beta2,
                    epsilon=adam.eps,
                    weight_decay=adam.weight_decay,
                    max_grad_norm=adam.grad_clip_norm or None,
                ),
            )
            return pb.Work(optim_step=step), {}

        return await self._queues.put(caller, model, place.seq_id, make)

    async def load(self, caller: Caller, body: bytes) -> dict[str, str]:
        """A checkpoint's weights in place of a model's: the ticket."""
        place = bodies.parse(bodies.Sequenced, body)
        model = ModelId.parse(place.model_id)

        async def make() -> Made:
            request = bodies.parse(bodies.LoadWeights, body)
            path = CheckpointPath.parse(request.path)
            checkpoint = await self._checkpoints.get(caller, path)
            load = training_service_pb2.LoadCheckpointRequest(
                adapter=model.adapter(caller.project),
                checkpoint=checkpoint.name,
                with_optimizer=request.optimizer,
            )
            return pb.Work(load_checkpoint=load), {"path": str(path)}

        return await self._queues.put(caller, model, place.seq_id, make)

    def _batch(self, request: tinker_pb2.ForwardBackwardRequest, adapter: str) -> Made:
        if request.loss_fn == SUBSTITUTE and self._config.stable_reinforce == "refuse":
            raise Unimplemented(
                "loss_fn: stable_reinforce has no public formula, and this gateway is configured "
                "to refuse a substitute",
                field="loss_fn",
                value=SUBSTITUTE,
            )
        loss = loss_of(request)
        config = config_of(request, loss)
        data, columns = data_of(request, loss, max_columns=self._config.max_target_columns)
        note: dict[str, Any] = {"runs": runs_of(columns)} if any(columns) else {}
        if request.loss_fn == SUBSTITUTE:
            note["substitute"] = True
        if request.forward_only:
            forward = training_service_pb2.ForwardRequest(
                adapter=adapter, data=data, loss_config=config
            )
            return pb.Work(forward=forward), note
        op = training_service_pb2.ForwardBackwardRequest(
            adapter=adapter, data=data, loss_config=config
        )
        return pb.Work(forward_backward=op), note


def _check_seq(seq_id: int) -> None:
    if not 1 <= seq_id <= MAX_SEQ:
        raise InvalidRequest(
            f"seq_id: {seq_id} is not in [1, {MAX_SEQ}]", field="seq_id", value=seq_id
        )


def _place_in(head: bytes) -> tuple[str, int]:
    """model_id and seq_id, the first two fields of a ForwardBackwardRequest; empty: not there.

    The SDK writes them first, as every writer does that follows the fields' numbers.
    """
    if len(head) < 2 or head[0] != 0x0A or head[1] > 0x7F:
        return "", 0
    end = 2 + head[1]
    for length in range(2, 7):
        try:
            place = tinker_pb2.ForwardBackwardRequest.FromString(head[: end + length])
        except DecodeError:
            continue
        if place.seq_id > 0:
            return place.model_id, place.seq_id
    return "", 0
