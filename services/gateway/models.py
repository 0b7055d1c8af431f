"""Models: training runs, each an adapter of the mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh.api.common.v1 import policy_pb2
from rollmesh.api.coordinator.v1 import adapter_service_pb2
from rollmesh.api.coordinator.v1 import future_service_pb2 as pb
from rollmesh.convert.values import duration_to_pb
from rollmesh.errors import InvalidRequest, Unimplemented
from services.gateway.queues import begin_run
from services.gateway.wire.ids import ModelId, session_id
from services.gateway.wire.paths import CheckpointPath
from services.gateway.wire.tickets import TrainTicket

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.gateway.callers import Caller
    from services.gateway.checkpoints import Checkpoints
    from services.gateway.config import GatewayConfig
    from services.gateway.documents import Documents, Fields
    from services.gateway.queues import Queues
    from services.gateway.sessions import Sessions
    from services.gateway.wire import bodies

ALPHA = 32.0
"""Of every adapter: the SDK's convention, which does not travel on the wire."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
UNEMBEDDING = ("lm_head",)
ADAM = {"type": "adamw"}


class Models:
    """Creates models and tells of them. `clock`: Unix seconds."""

    def __init__(
        self,
        config: GatewayConfig,
        documents: Documents,
        sessions: Sessions,
        queues: Queues,
        checkpoints: Checkpoints,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._documents = documents
        self._sessions = sessions
        self._queues = queues
        self._checkpoints = checkpoints
        self._clock = clock

    async def create(self, caller: Caller, body: bodies.CreateModel) -> dict[str, str]:
        """A fresh model: the ticket of its making."""
        model = ModelId(session_id(body.session_id), body.model_seq_id)
        await self._sessions.get(caller, model.session)
        _check_optimizer(body.optimizer_config)
        lora = body.lora_config
        run: Fields = {
            "base_model": body.base_model,
            "rank": lora.rank if lora else 32,
            "seed": (lora.seed if lora else None) or 0,
            "train_attn": lora.train_attn if lora else True,
            "train_mlp": lora.train_mlp if lora else True,
            "train_unembed": lora.train_unembed if lora else True,
            "user_metadata": body.user_metadata,
            "time": self._clock(),
        }
        _check_rank(run["rank"])
        request = adapter_service_pb2.CreateAdapterRequest(
            name=model.adapter(caller.project),
            base_model=body.base_model,
            lora=policy_pb2.LoraConfig(
                rank=run["rank"],
                alpha=ALPHA,
                target_modules=self._targets(run),
                seed=run["seed"],
            ),
            idle_ttl=duration_to_pb(self._config.model_idle_ttl_s),
        )
        await begin_run(self._documents, caller.project, model, run)
        return await self._queues.take(
            caller, TrainTicket(model, 0), pb.Work(create_adapter=request)
        )

    async def load(self, caller: Caller, body: bodies.LoadWeights) -> dict[str, str]:
        """A new model with a checkpoint's weights: the ticket of its making."""
        if body.session_id is None or body.model_seq_id is None:
            raise InvalidRequest(
                "session_id and model_seq_id, or model_id and seq_id, are needed",
                field="session_id",
            )
        model = ModelId(session_id(body.session_id), body.model_seq_id)
        await self._sessions.get(caller, model.session)
        if body.optimizer_config:
            _check_optimizer(body.optimizer_config)
        path = CheckpointPath.parse(body.path)
        checkpoint = await self._checkpoints.get(caller, path)
        if body.base_model not in {None, "", checkpoint.base_model}:
            raise InvalidRequest(
                f"base_model: {body.base_model!r}; the checkpoint is of {checkpoint.base_model!r}",
                field="base_model",
                value=body.base_model,
                allowed=checkpoint.base_model,
            )
        shape = await self._checkpoints.shape(caller, path, checkpoint)
        run = {
            **shape,
            "user_metadata": body.user_metadata,
            "loaded_from": str(path),
            "time": self._clock(),
        }
        await begin_run(self._documents, caller.project, model, run)
        request = adapter_service_pb2.ForkAdapterRequest(
            name=model.adapter(caller.project),
            checkpoint=checkpoint.name,
            with_optimizer=body.optimizer,
            idle_ttl=duration_to_pb(self._config.model_idle_ttl_s),
        )
        return await self._queues.take(
            caller, TrainTicket(model, 0, {"path": str(path)}), pb.Work(fork_adapter=request)
        )

    async def info(self, caller: Caller, body: bodies.OfModel) -> Fields:
        """What a model is."""
        model = ModelId.parse(body.model_id)
        run = (await self._queues.run(caller, model)).fields
        base_model = run["base_model"]
        return {
            "type": "get_info",
            "model_id": str(model),
            "model_name": base_model,
            "model_data": {
                "arch": None,
                "model_name": base_model,
                "tokenizer_id": self._config.tokenizer_of(base_model),
            },
            "is_lora": True,
            "lora_rank": run["rank"],
            "optimizer_config": ADAM,
        }

    def _targets(self, run: Fields) -> list[str]:
        """The modules to adapt; none: all linear layers but the unembedding, as it is meant."""
        unembedding = run["train_unembed"] and self._config.unembedding
        if run["train_attn"] and run["train_mlp"] and not unembedding:
            return []
        targets = [
            *(ATTENTION if run["train_attn"] else ()),
            *(MLP if run["train_mlp"] else ()),
            *(UNEMBEDDING if unembedding else ()),
        ]
        if not targets:
            raise InvalidRequest(
                "lora_config: nothing is left to train; the unembedding is not adapted here, so "
                "train_attn or train_mlp is needed",
                field="lora_config",
            )
        return targets


def _check_optimizer(optimizer: bodies.Optimizer) -> None:
    if optimizer.type != "adamw":
        raise Unimplemented(
            f"optimizer_config.type: {optimizer.type[:50]!r}; this mesh has adamw",
            field="optimizer_config.type",
            value=optimizer.type[:50],
            allowed="adamw",
        )


def _check_rank(rank: int) -> None:
    if not 1 <= rank < 2**31:
        raise InvalidRequest(
            f"lora_config.rank: {rank}; at least 1", field="lora_config.rank", value=rank
        )
