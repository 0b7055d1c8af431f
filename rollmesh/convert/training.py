"""Training data, losses, optimizer settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.api.common.v1 import tensor_pb2, training_pb2
from rollmesh.convert.tensors import tensor_from_pb, tensor_to_pb
from rollmesh.convert.values import optional
from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rollmesh.api.coordinator.v1 import training_service_pb2
    from rollmesh.api.trainer.v1 import trainer_service_pb2

_LOSSES: dict[types.LossName, training_pb2.Loss.ValueType] = {
    "cross_entropy": training_pb2.LOSS_CROSS_ENTROPY,
    "importance_sampling": training_pb2.LOSS_IMPORTANCE_SAMPLING,
    "ppo": training_pb2.LOSS_PPO,
    "cispo": training_pb2.LOSS_CISPO,
    "dro": training_pb2.LOSS_DRO,
    "gspo": training_pb2.LOSS_GSPO,
    "stable_reinforce": training_pb2.LOSS_STABLE_REINFORCE,
}
_LOSS_OPTIONS = (
    "kl_coefficient",
    "clip_low_threshold",
    "clip_high_threshold",
    "beta",
    "max_importance_ratio",
    "temperature",
    "max_sequence_ratio",
    "sampler_kl_coefficient",
)


def datum_to_pb(datum: types.Datum) -> training_pb2.Datum:
    """Datum."""
    message = training_pb2.Datum(
        token_ids=tensor_to_pb(datum.token_ids, "<i4"),
        target_token_ids=tensor_to_pb(datum.target_token_ids, "<i4"),
    )
    for name in ("weights", "sampling_logprobs", "advantages"):
        if (values := getattr(datum, name)) is not None:
            getattr(message, name).CopyFrom(tensor_to_pb(values))
    if datum.sequence_ids is not None:
        message.sequence_ids.CopyFrom(tensor_to_pb(datum.sequence_ids, "<i4"))
    return message


def data_from_pb(messages: Iterable[training_pb2.Datum]) -> list[types.Datum]:
    """A batch; errors name the datum by its index."""
    return [_datum_from_pb(message, f"data[{index}]") for index, message in enumerate(messages)]


def _datum_from_pb(message: training_pb2.Datum, path: str) -> types.Datum:
    def floats(name: str) -> types.FloatArray | None:
        if not message.HasField(name):  # type: ignore[arg-type]
            return None
        return tensor_from_pb(getattr(message, name), field=f"{path}.{name}", dtype="<f4")

    return types.Datum(
        token_ids=tensor_from_pb(message.token_ids, field=f"{path}.token_ids", dtype="<i4"),
        target_token_ids=tensor_from_pb(
            message.target_token_ids, field=f"{path}.target_token_ids", dtype="<i4"
        ),
        weights=floats("weights"),
        sampling_logprobs=floats("sampling_logprobs"),
        advantages=floats("advantages"),
        sequence_ids=tensor_from_pb(message.sequence_ids, field=f"{path}.sequence_ids", dtype="<i4")
        if message.HasField("sequence_ids")
        else None,
    )


def loss_to_pb(config: types.LossConfig) -> training_pb2.LossConfig:
    """LossConfig."""
    if config.loss not in _LOSSES:
        raise _unknown_loss(config.loss)
    return training_pb2.LossConfig(
        loss=_LOSSES[config.loss],
        entropy=config.entropy,
        **{name: getattr(config, name) for name in _LOSS_OPTIONS},
    )


def loss_from_pb(message: training_pb2.LossConfig) -> types.LossConfig:
    """LossConfig."""
    names = {number: name for name, number in _LOSSES.items()}
    if message.loss not in names:
        raise _unknown_loss(message.loss)
    return types.LossConfig(
        names[message.loss],
        entropy=message.entropy,
        **{name: optional(message, name) for name in _LOSS_OPTIONS},
    )


def optional_loss_from_pb(
    message: trainer_service_pb2.ForwardRequest | training_service_pb2.ForwardRequest,
) -> types.LossConfig | None:
    """The request's `loss_config`; None: no loss is wanted."""
    return loss_from_pb(message.loss_config) if message.HasField("loss_config") else None


def _unknown_loss(value: object) -> InvalidRequest:
    allowed = ", ".join(_LOSSES)
    return InvalidRequest(
        f"loss_config.loss: {value} is not one of {allowed}",
        field="loss_config.loss",
        value=value,
        allowed=allowed,
    )


def adam_to_pb(config: types.AdamConfig) -> training_pb2.AdamConfig:
    """AdamConfig."""
    return training_pb2.AdamConfig(
        learning_rate=config.learning_rate,
        beta1=config.beta1,
        beta2=config.beta2,
        epsilon=config.epsilon,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )


def adam_from_pb(message: training_pb2.AdamConfig) -> types.AdamConfig:
    """AdamConfig, absent fields at their defaults."""
    given = {
        name: getattr(message, name)
        for name in ("beta1", "beta2", "epsilon", "weight_decay", "max_grad_norm")
        if message.HasField(name)
    }
    return types.AdamConfig(learning_rate=message.learning_rate, **given)


def arrays_to_pb(arrays: Iterable[types.FloatArray]) -> list[tensor_pb2.Tensor]:
    """float32 vectors."""
    return [tensor_to_pb(array) for array in arrays]


def arrays_from_pb(messages: Iterable[tensor_pb2.Tensor]) -> tuple[types.FloatArray, ...]:
    """float32 vectors."""
    return tuple(tensor_from_pb(message, field="logprobs", dtype="<f4") for message in messages)
