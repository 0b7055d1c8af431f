"""Every input that the trainer refuses, and the field that its error names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rollmesh.errors import InvalidRequest
from rollmesh.types import AdamConfig, Datum, LoraConfig, LossConfig
from services.trainer.checks import check_adam, check_batch, check_loss, resolve_lora

NAN, INF = float("nan"), float("inf")
CROSS_ENTROPY, SAMPLED = LossConfig("cross_entropy"), LossConfig("importance_sampling")
STABLE = LossConfig("stable_reinforce")


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
        pytest.param(
            [PLAIN],
            LossConfig("cross_entropy", max_importance_ratio=2.0),
            "data[0].sampling_logprobs",
            id="truncated cross_entropy without logprobs",
        ),
        *(
            pytest.param(
                [replace(GOOD, **{name: None})],
                LossConfig(loss),
                f"data[0].{name}",
                id=f"{loss} {name}",
            )
            for loss in ("ppo", "cispo", "dro", "gspo", "stable_reinforce")
            for name in ("sampling_logprobs", "advantages")
        ),
        *(
            pytest.param([replace(data, weights=weights)], config, "data[0].weights", id=why)
            for why, data, weights, config in [
                ("negative with KL", PLAIN, floats(1, -1), LossConfig("cross_entropy", 0.1)),
                ("-inf", PLAIN, floats(1, -INF), CROSS_ENTROPY),
                ("NaN", PLAIN, floats(1, NAN), CROSS_ENTROPY),
                *(
                    (f"negative of {loss}", GOOD, floats(1, -1), LossConfig(loss))
                    for loss in ("ppo", "cispo", "dro", "gspo", "stable_reinforce")
                ),
            ]
        ),
        *(
            pytest.param([replace(GOOD, sequence_ids=ids)], config, "data[0].sequence_ids", id=why)
            for why, ids, config in [
                ("sequences of another loss", ints(0, 0), LossConfig("gspo")),
                ("short sequence_ids", ints(0), STABLE),
                ("sequence -2", ints(0, -2), STABLE),
            ]
        ),
        pytest.param([PLAIN], LossConfig("dro", beta=-1), "loss_config.beta", id="wrong setting"),
    ],
)
def test_a_batch_is_refused_by_the_field_that_is_wrong(data, config, field):
    with pytest.raises(InvalidRequest) as caught:
        check_batch(data, config, vocab_size=10, max_length=8)
    assert caught.value.context["field"] == field
    assert field in str(caught.value)


TAKEN = {
    "cross_entropy": {"max_importance_ratio"},
    "importance_sampling": {"max_importance_ratio"},
    "ppo": {"clip_low_threshold", "clip_high_threshold", "max_importance_ratio"},
    "cispo": {"clip_low_threshold", "clip_high_threshold"},
    "dro": {"beta"},
    "gspo": {"clip_low_threshold", "clip_high_threshold", "max_importance_ratio"},
    "stable_reinforce": {"max_importance_ratio", "max_sequence_ratio", "sampler_kl_coefficient"},
}
# Within the range of each loss that takes it.
GIVEN = {
    "clip_low_threshold": 0.5,
    "clip_high_threshold": 1.5,
    "beta": 0.1,
    "max_importance_ratio": 2.0,
    "max_sequence_ratio": 1.1,
    "sampler_kl_coefficient": 0.0,
}


@pytest.mark.parametrize("option", GIVEN)
@pytest.mark.parametrize("loss", TAKEN)
def test_a_loss_refuses_exactly_the_options_that_it_does_not_take(loss, option):
    config = LossConfig(loss, kl_coefficient=0.1, entropy=True, **{option: GIVEN[option]})
    if option in TAKEN[loss]:
        check_loss(config)
        return
    with pytest.raises(InvalidRequest, match=f"{loss} takes no {option}") as caught:
        check_loss(config)
    assert caught.value.context == {
        "field": f"loss_config.{option}",
        "value": str(GIVEN[option]),
        "allowed": "absent",
    }


@pytest.mark.parametrize(
    ("config", "field", "allowed"),
    [
        *(
            (LossConfig(loss, **{field: value}), field, allowed)
            for loss, field, allowed in [
                *((loss, "kl_coefficient", "finite, ≥ 0") for loss in TAKEN),
                ("dro", "beta", "finite, ≥ 0"),
                ("ppo", "clip_low_threshold", "finite, ≥ 0, ≤ 1.2"),
                ("cispo", "clip_low_threshold", "finite, ≥ 0, ≤ 4"),
                ("gspo", "clip_low_threshold", "finite, ≥ 0, ≤ 1.0004"),
                ("ppo", "clip_high_threshold", "finite, ≥ 0.8"),
                ("cispo", "clip_high_threshold", "finite, ≥ 0"),
                ("gspo", "clip_high_threshold", "finite, ≥ 0.9997"),
                ("cross_entropy", "max_importance_ratio", "finite, ≥ 0, > 0"),
                ("importance_sampling", "max_importance_ratio", "finite, ≥ 0, > 0"),
                ("ppo", "max_importance_ratio", "finite, ≥ 1.2, > 0"),
                ("gspo", "max_importance_ratio", "finite, ≥ 1.0004, > 0"),
                ("stable_reinforce", "max_importance_ratio", "finite, ≥ 1, > 0"),
                ("stable_reinforce", "max_sequence_ratio", "finite, > 1"),
                ("stable_reinforce", "sampler_kl_coefficient", "finite, ≥ 0"),
            ]
            for value in (NAN, INF, -INF, -0.1)
        ),
        (LossConfig("ppo", clip_low_threshold=1.3), "clip_low_threshold", "finite, ≥ 0, ≤ 1.2"),
        (LossConfig("ppo", clip_high_threshold=0.7), "clip_high_threshold", "finite, ≥ 0.8"),
        (
            LossConfig("gspo", clip_low_threshold=3, clip_high_threshold=2),
            "clip_low_threshold",
            "finite, ≥ 0, ≤ 2",
        ),
        (LossConfig("ppo", max_importance_ratio=1.1), "max_importance_ratio", "finite, ≥ 1.2, > 0"),
        (replace(STABLE, max_importance_ratio=0.9), "max_importance_ratio", "finite, ≥ 1, > 0"),
        (replace(STABLE, max_sequence_ratio=1.0), "max_sequence_ratio", "finite, > 1"),
        (
            LossConfig("cross_entropy", max_importance_ratio=0.0),
            "max_importance_ratio",
            "finite, ≥ 0, > 0",
        ),
    ],
)
def test_a_setting_of_a_loss_out_of_range_is_refused(config, field, allowed):
    with pytest.raises(InvalidRequest) as caught:
        check_loss(config)
    assert caught.value.context == {
        "field": f"loss_config.{field}",
        "value": str(getattr(config, field)),
        "allowed": allowed,
    }


@pytest.mark.parametrize(
    ("data", "config"),
    [
        pytest.param([PLAIN], CROSS_ENTROPY, id="plain"),
        pytest.param([GOOD], SAMPLED, id="sampled"),
        pytest.param([replace(GOOD, sampling_logprobs=floats(1e-7, -1))], SAMPLED, id="rounded 0"),
        pytest.param([replace(PLAIN, weights=floats(0, 0))], CROSS_ENTROPY, id="all masked"),
        pytest.param([PLAIN], LossConfig("cross_entropy", 0.0), id="KL measured"),
        pytest.param(
            [replace(PLAIN, weights=floats(-3, 0.5))],
            LossConfig("cross_entropy", 0.0),
            id="negative weights",
        ),
        pytest.param(
            [replace(GOOD, advantages=None)],
            LossConfig("cross_entropy", max_importance_ratio=2.0),
            id="truncated cross_entropy",
        ),
        *(
            pytest.param([GOOD], LossConfig(loss), id=loss)
            for loss in ("ppo", "cispo", "dro", "gspo", "stable_reinforce")
        ),
        pytest.param([replace(GOOD, sequence_ids=ints(-1, 2**31 - 1))], STABLE, id="sequence_ids"),
        pytest.param(
            [GOOD], replace(STABLE, max_importance_ratio=1.0, max_sequence_ratio=1.0001), id="least"
        ),
        pytest.param(
            [GOOD],
            LossConfig("ppo", clip_low_threshold=1, clip_high_threshold=1, max_importance_ratio=1),
            id="bounds that meet",
        ),
        pytest.param(
            [replace(GOOD, advantages=floats(1e30, -1e30))], SAMPLED, id="huge advantages"
        ),
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
    assert caught.value.context["value"] == str(value)
    assert caught.value.context["allowed"].startswith("finite")


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


def test_the_unembedding_is_a_target_for_who_names_it_alone():
    model = {"max_rank": 8, "target_modules": ("q_proj",), "unembedding": "lm_head"}
    assert resolve_lora(LoraConfig(4), **model).target_modules == ("q_proj",)
    both = LoraConfig(4, target_modules=("lm_head", "q_proj"))
    assert resolve_lora(both, **model).target_modules == ("q_proj", "lm_head")
