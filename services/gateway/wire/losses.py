"""The losses of the wire: what each takes, and what it is in the mesh."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rollmesh.api.common.v1 import training_pb2
from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rollmesh.api.tinker.v1 import tinker_pb2 as pb

_CLIP = {
    "clip_low_threshold": "clip_low_threshold",
    "clip_high_threshold": "clip_high_threshold",
}
_POLICY_GRADIENT = frozenset({"target_tokens", "logprobs", "advantages"})
SUBSTITUTE = "stable_reinforce"
"""The loss whose formula is not public, and that the mesh has a loss of its own for."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss. `options`: of loss_fn_config, and what they are called in LossConfig.

    `needed`, `optional`: of loss_fn_inputs. `masks_prompts`: positions without an advantage and a
    log-probability of the sampler, as prompts have them, count for nothing. `sequences`: it is told
    which sample each position is of.
    """

    kind: training_pb2.Loss.ValueType
    needed: frozenset[str] = _POLICY_GRADIENT
    optional: frozenset[str] = frozenset()
    options: Mapping[str, str] = field(default_factory=dict)
    masks_prompts: bool = False
    sequences: bool = False


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(
        training_pb2.LOSS_CROSS_ENTROPY, frozenset({"target_tokens"}), frozenset({"weights"})
    ),
    "importance_sampling": Loss(training_pb2.LOSS_IMPORTANCE_SAMPLING, masks_prompts=True),
    "ppo": Loss(training_pb2.LOSS_PPO, options=_CLIP, masks_prompts=True),
    "cispo": Loss(training_pb2.LOSS_CISPO, options=_CLIP, masks_prompts=True),
    # Of these two all positions count by their formulas: a prompt's pull of dro is its own, and
    # gspo's mean is over what its mask says.
    "dro": Loss(training_pb2.LOSS_DRO, options={"beta": "beta"}),
    "gspo": Loss(
        training_pb2.LOSS_GSPO, optional=frozenset({"sequence_ratio_mask"}), options=_CLIP
    ),
    SUBSTITUTE: Loss(
        training_pb2.LOSS_STABLE_REINFORCE,
        options={"kl_coeff": "sampler_kl_coefficient"},
        masks_prompts=True,
        sequences=True,
    ),
}


def loss_of(request: pb.ForwardBackwardRequest) -> Loss:
    """The loss that is asked for.

    Raises:
        InvalidRequest: there is none of that name.
    """
    loss = LOSSES.get(request.loss_fn)
    if loss is None:
        allowed = ", ".join(LOSSES)
        raise InvalidRequest(
            f"loss_fn: {request.loss_fn[:50]!r} is not one of {allowed}",
            field="loss_fn",
            value=request.loss_fn[:50],
            allowed=allowed,
        )
    return loss


def config_of(request: pb.ForwardBackwardRequest, loss: Loss) -> training_pb2.LossConfig:
    """Its settings.

    Raises:
        InvalidRequest: one that the loss does not take, or that is no finite number.
    """
    given: dict[str, float | str] = dict(request.loss_fn_config)
    for name, value in request.loss_fn_config_v2.items():
        given[name] = value.number if value.WhichOneof("value") == "number" else value.text
    config = training_pb2.LossConfig(loss=loss.kind)
    for name, number in sorted(given.items()):
        path = f"loss_fn_config.{name[:50]}"
        if name not in loss.options:
            allowed = ", ".join(loss.options) or "none"
            raise InvalidRequest(
                f"{path}: {request.loss_fn} does not take it; its settings: {allowed}",
                field=path,
                allowed=allowed,
            )
        if isinstance(number, str) or not np.isfinite(number):
            raise InvalidRequest(f"{path}: {number!r} is no finite number", field=path)
        setattr(config, loss.options[name], number)
    return config
