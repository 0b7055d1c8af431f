"""Every input that the trainer refuses, and the field that its error names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rollmesh.errors import InvalidRequest
from rollmesh.types import AdamConfig, Datum, LoraConfig, LossConfig
from services.trainer.checks import check_adam, check_batch, resolve_lora

NAN, INF = float("nan"), float("inf")
CROSS_ENTROPY, SAMPLED = LossConfig("cross_entropy"), LossConfig("importance_sampling")


def ints(*values):
    return np.array(values, np.int32)


def floats(*values):
    return np.array(values, np.float32)


PLAIN = Datum(ints(1, 2), ints(2, 3))
GOOD = Datum(ints(1, 2), ints(2, 3), floats(0, 1), floats(-1, 0), floats(0.5, -0.5))


@pytest.mark.parametrize(
    ("data", "config", "field"),
    [
        pytest.param([], SAMPLED, "data", id="empty batch"),
        *(
            pytest.param([GOOD, replace(GOOD, **changes)], SAMPLED, f"data[1].{field}", id=why)
            for why, field, changes in [
                ("no tokens", "token_ids", {"token_ids": ints(), "target_token_ids": ints()}),
                ("too long", "token_ids", {"token_ids": ints(*[1] * 9)}),
                ("token = vocab_size", "token_ids", {"token_ids": ints(1, 10)}),
                ("negative token", "token_ids", {"token_ids": ints(-1, 1)}),
                ("target outside", "target_token_ids", {"target_token_ids": ints(1, 10)}),
                ("short targets", "target_token_ids", {"target_token_ids": ints(1)}),
                ("short weights", "weights", {"weights": floats(1)}),
                ("negative weight", "weights", {"weights": floats(1, -0.1)}),
                ("NaN weight", "weights", {"weights": floats(NAN, 1)}),
                ("infinite weight", "weights", {"weights": floats(INF, 1)}),
                ("no logprobs", "sampling_logprobs", {"sampling_logprobs": None}),
                ("long logprobs", "sampling_logprobs", {"sampling_logprobs": floats(-1, -1, -1)}),
                ("NaN logprob", "sampling_logprobs", {"sampling_logprobs": floats(-1, NAN)}),
                ("-inf logprob", "sampling_logprobs", {"sampling_logprobs": floats(-1, -INF)}),
                ("positive logprob", "sampling_logprobs", {"sampling_logprobs": floats(0.1, -1)}),
                ("no advantages", "advantages", {"advantages": None}),
                ("short advantages", "advantages", {"advantages": floats(1)}),
                ("NaN advantage", "advantages", {"advantages": floats(1, NAN)}),
            ]
        ),
        pytest.param(
            [replace(PLAIN, advantages=floats(1, 1))],
            CROSS_ENTROPY,
            "data[0].advantages",
            id="extra",
        ),
        pytest.param(
            [replace(PLAIN, sampling_logprobs=floats(-1, -1))],
            CROSS_ENTROPY,
            "data[0].sampling_logprobs",
            id="extra logprobs",
        ),
        *(
            pytest.param(
                [PLAIN],
                LossConfig("cross_entropy", value),
                "loss_config.kl_coefficient",
                id=f"β {value}",
            )
            for value in (NAN, INF, -0.1)
        ),
    ],
)
def test_a_batch_is_refused_by_the_field_that_is_wrong(data, config, field):
    with pytest.raises(InvalidRequest) as caught:
        check_batch(data, config, vocab_size=10, max_length=8)
    assert caught.value.context["field"] == field
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("data", "config"),
    [
        pytest.param([PLAIN], CROSS_ENTROPY, id="plain"),
        pytest.param([GOOD], SAMPLED, id="sampled"),
        pytest.param([replace(GOOD, sampling_logprobs=floats(1e-7, -1))], SAMPLED, id="rounded 0"),
        pytest.param([replace(PLAIN, weights=floats(0, 0))], CROSS_ENTROPY, id="all masked"),
        pytest.param([PLAIN], LossConfig("cross_entropy", 0.0), id="KL measured"),
        pytest.param([Datum(ints(*[9] * 8), ints(*[0] * 8))], CROSS_ENTROPY, id="at the limits"),
    ],
)
def test_a_batch_within_the_contract_is_accepted(data, config):
    check_batch(data, config, vocab_size=10, max_length=8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("learning_rate", value) for value in (NAN, INF, -1e-3, 1e39)),
        *((beta, value) for beta in ("beta1", "beta2") for value in (NAN, -0.1, 1.0)),
        *(("epsilon", value) for value in (NAN, INF, 0.0, 1e39)),
        *(("weight_decay", value) for value in (NAN, INF, -0.1, 1e39)),
        *(("max_grad_norm", value) for value in (NAN, INF, 0.0, -1.0)),
    ],
)
def test_adam_settings_out_of_range_are_refused(field, value):
    with pytest.raises(InvalidRequest) as caught:
        check_adam(replace(AdamConfig(1e-3), **{field: value}))
    assert caught.value.context["field"] == f"adam.{field}"


@pytest.mark.parametrize(
    ("lora", "field"),
    [
        (LoraConfig(0), "lora.rank"),
        (LoraConfig(-1), "lora.rank"),
        (LoraConfig(9), "lora.rank"),
        (LoraConfig(4, alpha=0.0), "lora.alpha"),
        (LoraConfig(4, alpha=-1.0), "lora.alpha"),
        (LoraConfig(4, alpha=NAN), "lora.alpha"),
        (LoraConfig(4, alpha=INF), "lora.alpha"),
        (LoraConfig(4, target_modules=("q_proj", "lm_head")), "lora.target_modules"),
    ],
)
def test_a_lora_configuration_that_cannot_be_is_refused(lora, field):
    with pytest.raises(InvalidRequest) as caught:
        resolve_lora(lora, max_rank=8, target_modules=("q_proj", "v_proj"))
    assert caught.value.context["field"] == field


def test_an_unknown_target_lists_those_that_exist():
    with pytest.raises(InvalidRequest, match="q_proj, v_proj"):
        resolve_lora(
            LoraConfig(4, target_modules=("q",)), max_rank=8, target_modules=("q_proj", "v_proj")
        )


def test_defaults_are_filled_in():
    resolved = resolve_lora(LoraConfig(4), max_rank=8, target_modules=("q_proj", "v_proj"))
    assert resolved == LoraConfig(4, alpha=8.0, target_modules=("q_proj", "v_proj"), seed=0)


def test_the_order_of_targets_does_not_matter():
    names = ("v_proj", "q_proj", "v_proj")
    resolved = resolve_lora(
        LoraConfig(4, target_modules=names),
        max_rank=8,
        target_modules=("q_proj", "k_proj", "v_proj"),
    )
    assert resolved.target_modules == ("q_proj", "v_proj")
