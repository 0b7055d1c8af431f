"""What the trainer refuses before anything changes; each error names the field at fault."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from rollmesh.errors import InvalidRequest
from rollmesh.types import CLIP_RANGES
from services.trainer.losses import clip_range

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rollmesh.types import (
        AdamConfig,
        Datum,
        FloatArray,
        IntArray,
        LoraConfig,
        LossConfig,
        LossName,
    )

# The losses that take a field of LossConfig; all take those that are not here.
_TAKERS: dict[str, tuple[LossName, ...]] = {
    "clip_low_threshold": ("ppo", "cispo", "gspo"),
    "clip_high_threshold": ("ppo", "cispo", "gspo"),
    "beta": ("dro",),
    "max_importance_ratio": (
        "cross_entropy",
        "importance_sampling",
        "ppo",
        "gspo",
        "stable_reinforce",
    ),
    "max_sequence_ratio": ("stable_reinforce",),
    "sampler_kl_coefficient": ("stable_reinforce",),
}
MAX_TEMPERATURE = 2.0
# A log-probability of 0, made by a sampler in low precision, may come out a little above it.
_MAX_LOGPROB = 1e-3
# torch refuses scalars, and products of them, that overflow float32.
_MAX_SETTING = 1e18


def check_batch(
    data: Sequence[Datum], config: LossConfig, *, vocab_size: int, max_length: int
) -> None:
    """Refuse a batch that `config`'s loss cannot be computed of."""
    check_loss(config)
    check_tokens(data, vocab_size=vocab_size, max_length=max_length)
    needs = {
        "sampling_logprobs": config.loss != "cross_entropy"
        or config.max_importance_ratio is not None,
        "advantages": config.loss != "cross_entropy",
    }
    # Any linear function of the log-probabilities: what a loss comes to that a client computes.
    # A penalty that is turned around has no minimum.
    is_linear = config.loss == "cross_entropy" and not config.kl_coefficient
    for index, datum in enumerate(data):
        path = f"data[{index}]"
        if datum.weights is not None:
            low = -math.inf if is_linear else 0.0
            _check_floats(f"{path}.weights", datum.weights, datum, low=low)
        for name, needed in needs.items():
            values: FloatArray | None = getattr(datum, name)
            if (values is not None) != needed:
                verb = "needs" if needed else "takes no"
                raise InvalidRequest(
                    f"{path}.{name}: {config.loss} {verb} {name}",
                    field=f"{path}.{name}",
                    value="present" if values is not None else "absent",
                    allowed="present" if needed else "absent",
                )
        if datum.sampling_logprobs is not None:
            values = datum.sampling_logprobs
            _check_floats(f"{path}.sampling_logprobs", values, datum, high=_MAX_LOGPROB)
        if datum.advantages is not None:
            _check_floats(f"{path}.advantages", datum.advantages, datum)
        _check_sequence_ids(f"{path}.sequence_ids", datum, config)


def _check_sequence_ids(field: str, datum: Datum, config: LossConfig) -> None:
    ids = datum.sequence_ids
    if ids is None:
        return
    if config.loss != "stable_reinforce":
        raise InvalidRequest(
            f"{field}: {config.loss} takes no sequence_ids",
            field=field,
            value="present",
            allowed="absent",
        )
    _check_length(field, ids, datum)
    if (ids < -1).any():
        position = int(np.argmax(ids < -1))
        raise InvalidRequest(
            f"{field}[{position}]: {ids[position]}, must be ≥ -1",
            field=field,
            value=ids[position],
            allowed="≥ -1",
        )


def check_loss(config: LossConfig) -> None:
    """Refuse fields that the loss does not take, and values outside the ranges of LossConfig."""
    for name, takers in _TAKERS.items():
        value: float | None = getattr(config, name)
        if value is not None and config.loss not in takers:
            raise InvalidRequest(
                f"loss_config.{name}: {config.loss} takes no {name}; {', '.join(takers)} do",
                field=f"loss_config.{name}",
                value=value,
                allowed="absent",
            )
    if config.kl_coefficient is not None:
        _check_number("loss_config.kl_coefficient", config.kl_coefficient, at_least=0)
    check_temperature("loss_config.temperature", config.temperature)
    if config.beta is not None:
        _check_number("loss_config.beta", config.beta, at_least=0)
    if config.max_sequence_ratio is not None:
        _check_number("loss_config.max_sequence_ratio", config.max_sequence_ratio, above=1)
    if config.sampler_kl_coefficient is not None:
        _check_number(
            "loss_config.sampler_kl_coefficient", config.sampler_kl_coefficient, at_least=0
        )
    # Truncated below 1, the penalty towards the sampling policy would push away from it.
    high = 1.0 if config.loss == "stable_reinforce" else 0.0
    if config.loss in CLIP_RANGES:
        low, high = clip_range(config)
        # Of two that contradict each other the one at fault is the one that was given.
        least = low if config.clip_low_threshold is None else 0
        _check_number("loss_config.clip_high_threshold", high, at_least=least)
        _check_number("loss_config.clip_low_threshold", low, at_least=0, at_most=high)
    if config.max_importance_ratio is not None:
        _check_number(
            "loss_config.max_importance_ratio", config.max_importance_ratio, above=0, at_least=high
        )


def check_temperature(field: str, temperature: float | None) -> None:
    """Refuse one outside the range of LossConfig."""
    if temperature is not None:
        _check_number(field, temperature, above=0, at_most=MAX_TEMPERATURE)


def check_one_temperature(temperature: float | None) -> None:
    """Refuse one beside a LossConfig, which has its own."""
    if temperature is not None:
        raise InvalidRequest(
            "temperature: with a loss_config it is loss_config.temperature that says it",
            field="temperature",
            value=temperature,
            allowed="absent",
        )


def check_tokens(data: Sequence[Datum], *, vocab_size: int, max_length: int) -> None:
    """Refuse an empty batch, and sequences that the base model cannot read."""
    if not data:
        raise InvalidRequest("data: empty, at least one datum is needed", field="data")
    for index, datum in enumerate(data):
        path = f"data[{index}]"
        length = len(datum.token_ids)
        if not 1 <= length <= max_length:
            raise InvalidRequest(
                f"{path}.token_ids: {length} tokens, must be 1 to {max_length}",
                field=f"{path}.token_ids",
                value=length,
                allowed=f"1 to {max_length} tokens",
            )
        _check_length(f"{path}.target_token_ids", datum.target_token_ids, datum)
        _check_vocabulary(f"{path}.token_ids", datum.token_ids, vocab_size)
        _check_vocabulary(f"{path}.target_token_ids", datum.target_token_ids, vocab_size)


def check_adam(config: AdamConfig) -> None:
    """Refuse settings outside the ranges of AdamConfig."""
    _check_number("adam.learning_rate", config.learning_rate, at_least=0, below=_MAX_SETTING)
    _check_number("adam.beta1", config.beta1, at_least=0, below=1)
    _check_number("adam.beta2", config.beta2, at_least=0, below=1)
    _check_number("adam.epsilon", config.epsilon, above=0, below=_MAX_SETTING)
    _check_number("adam.weight_decay", config.weight_decay, at_least=0, below=_MAX_SETTING)
    if config.max_grad_norm is not None:
        _check_number("adam.max_grad_norm", config.max_grad_norm, above=0)


def resolve_lora(
    lora: LoraConfig,
    *,
    max_rank: int,
    target_modules: Sequence[str],
    unembedding: str | None = None,
) -> LoraConfig:
    """`lora` with its defaults filled in, its targets in the order of the model.

    Without targets of its own it has `target_modules`; the unembedding only where it is named.
    """
    if not 1 <= lora.rank <= max_rank:
        raise InvalidRequest(
            f"lora.rank: {lora.rank}, must be 1 to {max_rank}",
            field="lora.rank",
            value=lora.rank,
            allowed=f"1 to {max_rank}",
        )
    alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
    _check_number("lora.alpha", alpha, above=0)
    targets = (*target_modules, *([] if unembedding is None else [unembedding]))
    for name in lora.target_modules:
        if name not in targets:
            allowed = ", ".join(targets)
            raise InvalidRequest(
                f"lora.target_modules: no linear layer is called {name!r}; there are {allowed}",
                field="lora.target_modules",
                value=name,
                allowed=allowed,
            )
    wanted = lora.target_modules or target_modules
    return type(lora)(
        rank=lora.rank,
        alpha=alpha,
        target_modules=tuple(name for name in targets if name in wanted),
        seed=lora.seed,
    )


def _check_number(
    field: str,
    value: float,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> None:
    if math.isfinite(value) and at_least <= value <= at_most and above < value < below:
        return
    bounds = {"≥": at_least, ">": above, "≤": at_most, "<": below}
    said = [f"{sign} {bound:g}" for sign, bound in bounds.items() if math.isfinite(bound)]
    allowed = ", ".join(["finite", *said])
    raise InvalidRequest(
        f"{field}: {value}, must be {allowed}", field=field, value=value, allowed=allowed
    )


def _check_length(field: str, values: IntArray | FloatArray, datum: Datum) -> None:
    if len(values) != len(datum.token_ids):
        raise InvalidRequest(
            f"{field}: {len(values)} values for {len(datum.token_ids)} token_ids",
            field=field,
            value=len(values),
            allowed=len(datum.token_ids),
        )


def _check_vocabulary(field: str, token_ids: IntArray, vocab_size: int) -> None:
    wrong = (token_ids < 0) | (token_ids >= vocab_size)
    if wrong.any():
        position = int(np.argmax(wrong))
        raise InvalidRequest(
            f"{field}[{position}]: {token_ids[position]} is outside the vocabulary, "
            f"0 to {vocab_size - 1}",
            field=field,
            value=token_ids[position],
            allowed=f"0 to {vocab_size - 1}",
        )


def _check_floats(
    field: str,
    values: FloatArray,
    datum: Datum,
    *,
    low: float = -math.inf,
    high: float = math.inf,
) -> None:
    _check_length(field, values, datum)
    wrong = ~(np.isfinite(values) & (values >= low) & (values <= high))
    if wrong.any():
        position = int(np.argmax(wrong))
        allowed = "finite" if low == -math.inf else "finite, ≥ 0"
        allowed = allowed if high == math.inf else "finite, ≤ 0"
        raise InvalidRequest(
            f"{field}[{position}]: {values[position]}, must be {allowed}",
            field=field,
            value=values[position],
            allowed=allowed,
        )
