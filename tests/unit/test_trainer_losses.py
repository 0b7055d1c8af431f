"""The losses against values and gradients written out anew, one position at a time, in float64."""

# ruff: noqa: N803, N806 - as protos/ names them

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollmesh.types import Datum, LossConfig
from services.trainer.losses import entropies, losses, metrics

CONFIGS = {
    "cross_entropy": LossConfig("cross_entropy"),
    "cross_entropy, truncated": LossConfig("cross_entropy", max_importance_ratio=1.5),
    "importance_sampling": LossConfig("importance_sampling"),
    "importance_sampling, truncated": LossConfig("importance_sampling", max_importance_ratio=1.5),
    "ppo": LossConfig("ppo"),
    "ppo, other bounds": LossConfig("ppo", clip_low_threshold=0.3, clip_high_threshold=3.0),
    "ppo, truncated": LossConfig("ppo", max_importance_ratio=2.0),
    "cispo": LossConfig("cispo"),
    "cispo, other bounds": LossConfig("cispo", clip_low_threshold=0.7, clip_high_threshold=1.1),
    "dro": LossConfig("dro"),
    "dro, strong": LossConfig("dro", beta=2.0),
    "gspo": LossConfig("gspo"),
    "gspo, wide": LossConfig("gspo", clip_low_threshold=0.5, clip_high_threshold=1.6),
    "gspo, truncated": LossConfig("gspo", clip_high_threshold=1.01, max_importance_ratio=1.3),
    "stable_reinforce": LossConfig("stable_reinforce"),
    "stable_reinforce, unguarded": LossConfig(
        "stable_reinforce",
        max_importance_ratio=1.4,
        max_sequence_ratio=1e9,
        sampler_kl_coefficient=0.3,
    ),
}
CONFIGS |= {
    f"{name}, KL": replace(config, kl_coefficient=0.3)
    for name, config in CONFIGS.items()
    if "," not in name
}
CONFIGS["importance_sampling, KL measured"] = LossConfig("importance_sampling", 0.0)
BOUNDS = {"ppo": (0.8, 1.2), "cispo": (0.0, 4.0), "gspo": (1 - 3e-4, 1 + 4e-4)}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def drawn(seed, shape=(3, 5), spread=1.0):
    """Values of a batch; about every third position is masked, some advantages are 0."""
    rng = np.random.default_rng(seed)
    p = -rng.exponential(2.0, shape)
    return {
        "p": p,
        "w": rng.uniform(0.2, 2, shape) * (rng.random(shape) < 0.7),
        "q": np.minimum(p + rng.normal(size=shape) * spread, 0),
        "A": rng.normal(size=shape) * (rng.random(shape) < 0.9),
        "b": np.minimum(p + rng.normal(size=shape) * spread, 0),
    }


def bounds(config):
    low, high = BOUNDS[config.loss]
    return (
        low if config.clip_low_threshold is None else config.clip_low_threshold,
        high if config.clip_high_threshold is None else config.clip_high_threshold,
    )


def weight(config, log_ratio):
    """The importance weight that stands for exp(log_ratio)."""
    limit = math.inf if config.max_importance_ratio is None else config.max_importance_ratio
    return min(exp(log_ratio), limit)


def exp(value):
    return math.exp(value) if value < 709 else math.inf


def stable_term(config, p, q, A, now):
    """As `term`, of stable_reinforce."""
    limit = 2.0 if config.max_importance_ratio is None else config.max_importance_ratio
    r, kappa = min(exp(now - q), limit), config.sampler_kl_coefficient or 0.0
    log_r = min(now - q, math.log(limit)) + (p - now)
    return -r * p * A + kappa * (exp(log_r) - 1 - log_r), -r * A + kappa * (r - 1)


def term(config, p, q, A, now, log_s):
    """One position's term and its derivative by p; `now` is p where no gradient flows."""
    if config.loss == "cross_entropy":
        factor = 1.0 if config.max_importance_ratio is None else weight(config, now - q)
        return -factor * p, -factor
    if config.loss == "dro":
        beta = 0.05 if config.beta is None else config.beta
        return -(p * A - beta / 2 * (p - q) ** 2), -A + beta * (p - q)
    if config.loss == "cispo":
        low, high = bounds(config)
        factor = min(max(exp(now - q), low), high)
        return -factor * p * A, -factor * A
    r = weight(config, log_s if config.loss == "gspo" else now - q) * math.exp(p - now)
    if config.loss == "importance_sampling":
        return -r * A, -r * A
    low, high = bounds(config)
    clipped = min(max(r, low), high)
    if r * A <= clipped * A:
        return -r * A, -r * A
    return -clipped * A, 0.0


def left_out(config, ids, log_ratios):
    """The sampled sequences whose geometric mean ratio is too far from 1."""
    bound = 1.5 if config.max_sequence_ratio is None else config.max_sequence_ratio
    means = {each: np.mean(log_ratios[ids == each]) for each in set(ids.tolist())}
    return {each for each, mean in means.items() if not 1 / bound <= exp(mean) <= bound}


def oracle(config, p, w, q, A, b, now=None, ids=None):
    """Losses [B] and their gradients by p [B, T]."""
    ids = np.zeros(p.shape, np.int32) if ids is None else ids
    now = p if now is None else now
    found, gradients = np.zeros(len(p)), np.zeros(p.shape)
    for i in range(len(p)):
        counted = [t for t in range(p.shape[1]) if w[i, t] != 0]
        if config.loss == "stable_reinforce":
            counted = [t for t in counted if ids[i, t] >= 0]
            out = left_out(config, ids[i, counted], now[i, counted] - q[i, counted])
            counted = [t for t in counted if ids[i, t] not in out]
        log_s = sum(now[i, t] - q[i, t] for t in counted) / max(len(counted), 1)
        for t in counted:
            # Python's floats: they overflow without a warning.
            here = [values[i, t].item() for values in (p, q, A, now)]
            if config.loss == "stable_reinforce":
                value, gradient = stable_term(config, *here)
            else:
                value, gradient = term(config, *here, log_s)
            if config.kl_coefficient:
                d = b[i, t] - p[i, t]
                value += config.kl_coefficient * (math.exp(d) - d - 1)
                gradient += config.kl_coefficient * (1 - math.exp(d))
            found[i] += w[i, t] * value
            gradients[i, t] = w[i, t] * gradient
    return found, gradients


def computed(config, p, w, q, A, b, ids=None):
    """Losses [B] and their gradients by p [B, T]."""
    p = torch.tensor(p, requires_grad=True)
    found = losses(
        config,
        p,
        weights_BT=torch.tensor(w),
        sampling_logprobs_BT=torch.tensor(q),
        advantages_BT=torch.tensor(A),
        base_logprobs_BT=None if config.kl_coefficient is None else torch.tensor(b),
        sequence_ids_BT=ids,
    )
    (gradients,) = torch.autograd.grad(found.sum(), p)
    return found.detach().numpy(), gradients.numpy()


@each_config
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6)),
    spread=st.sampled_from([1e-5, 1e-3, 0.3, 3.0]),
)
def test_losses_and_gradients_are_those_of_the_formulas(config, seed, shape, spread):
    values = drawn(seed, shape, spread)
    for found, expected in zip(computed(config, **values), oracle(config, **values), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy, truncated"])
@pytest.mark.parametrize("seed", range(5))
def test_a_negative_weight_turns_its_position_around(name, seed):
    values = drawn(seed)
    values["w"] *= np.random.default_rng(seed + 9).choice([-1, 1], values["w"].shape)
    assert (values["w"] < 0).any()
    found, gradients = computed(CONFIGS[name], **values)
    expected = oracle(CONFIGS[name], **values)
    np.testing.assert_allclose(found, expected[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradients, expected[1], rtol=1e-9, atol=1e-12)
    assert (gradients > 0).tolist() == (values["w"] < 0).tolist()


@each_config
def test_gradients_are_those_of_finite_differences(config):
    values = drawn(1)
    p = values["p"]
    _, gradients = computed(config, **values)
    for place in np.ndindex(p.shape):
        step = np.zeros(p.shape)
        step[place] = 1e-6
        up, down = (
            oracle(config, **{**values, "p": moved}, now=p)[0].sum()
            for moved in (p + step, p - step)
        )
        assert gradients[place] == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("wild", [1e30, -1e30, math.inf, -math.inf, math.nan])
@each_config
def test_a_masked_position_adds_exactly_nothing_whatever_stands_there(config, wild):
    values = drawn(2)
    masked = values["w"] == 0
    assert masked.any()
    other = {**values, **{name: np.where(masked, wild, values[name]) for name in "pqAb"}}
    found, gradients = computed(config, **other)
    expected, expected_gradients = computed(config, **values)
    assert found.tolist() == expected.tolist()
    assert gradients.tolist() == expected_gradients.tolist()
    assert not gradients[masked].any()


@each_config
def test_a_row_has_the_same_bits_alone_padded_and_beside_others(config):
    values = {name: value.astype(np.float32) for name, value in drawn(3, (4, 37)).items()}
    padded = {name: np.pad(value, ((0, 0), (0, 11))) for name, value in values.items()}
    together, gradients = computed(config, **padded)
    for i in range(4):
        alone, own = computed(config, **{name: value[i : i + 1] for name, value in values.items()})
        assert alone.tobytes() == together[i : i + 1].tobytes()
        assert own.tobytes() == gradients[i : i + 1, :37].tobytes()


@each_config
def test_gradients_of_two_halves_add_up_to_those_of_the_whole(config):
    values = drawn(4, (6, 5))
    features = torch.tensor(np.random.default_rng(5).normal(size=(6, 5, 3)))

    def gradient(rows):
        _, by_p = computed(config, **{name: value[rows] for name, value in values.items()})
        return torch.einsum("btf,bt->f", features[rows], torch.tensor(by_p))

    parts = gradient(slice(0, 3)) + gradient(slice(3, 6))
    np.testing.assert_allclose(parts, gradient(slice(0, 6)), rtol=1e-12)


# --- extremes, in float32 as the model gives them ------------------------------------------------


def extreme(config, *, p, q, A, w=1.0):
    values = {"p": p, "w": w, "q": q, "A": A, "b": p}
    found, gradients = computed(
        config, **{name: np.array([[value]], np.float32) for name, value in values.items()}
    )
    return found.item(), gradients.item()


@pytest.mark.parametrize(
    ("config", "values", "loss", "gradient"),
    [
        ("cross_entropy", {"p": -1e4, "q": 0, "A": 0}, 1e4, -1.0),
        ("cross_entropy, truncated", {"p": -1, "q": -1e4, "A": 0}, 1.5, -1.5),
        ("importance_sampling", {"p": -1e4, "q": -1, "A": 1e30}, 0.0, 0.0),
        ("importance_sampling", {"p": -1, "q": -1e4, "A": 0}, 0.0, 0.0),
        ("importance_sampling", {"p": -60, "q": 0, "A": 1e30}, -math.exp(-60) * 1e30, ...),
        ("importance_sampling", {"p": -1, "q": -101, "A": 1e-30}, -math.exp(100) * 1e-30, ...),
        (
            "importance_sampling",
            {"p": 0, "q": -80, "A": 1e30, "w": 1e-35},
            -math.exp(80) / 1e5,
            ...,
        ),
        ("importance_sampling, truncated", {"p": -1, "q": -1e4, "A": 1e30}, -1.5e30, -1.5e30),
        ("ppo", {"p": -1, "q": -1e4, "A": 1e30}, -1.2e30, 0.0),
        ("ppo", {"p": -1, "q": -1e4, "A": 0}, 0.0, 0.0),
        ("ppo", {"p": -1e4, "q": -1, "A": -1e30}, 0.8e30, 0.0),
        ("ppo, truncated", {"p": -1, "q": -1e4, "A": -1e30}, 2e30, 2e30),
        ("cispo", {"p": -1e4, "q": -1, "A": 1e30}, 0.0, 0.0),
        ("cispo", {"p": -1, "q": -1e4, "A": 1e30}, 4e30, -4e30),
        ("dro", {"p": -1, "q": -1e4, "A": 0}, 0.025 * 9999.0**2, 0.05 * 9999),
        ("gspo", {"p": -1, "q": -1e4, "A": 1e30}, -1.0004e30, 0.0),
        ("gspo", {"p": -1, "q": -1e4, "A": 0}, 0.0, 0.0),
        ("gspo, truncated", {"p": -1, "q": -1e4, "A": -1}, 1.3, 1.3),
        ("stable_reinforce", {"p": -1, "q": -1e4, "A": 1e30}, 0.0, 0.0),
        ("stable_reinforce", {"p": -1, "q": -1, "A": 1e30}, 1e30, -1e30),
        ("stable_reinforce, unguarded", {"p": -1, "q": -21, "A": -1e30}, -1.4e30, 1.4e30),
    ],
)
def test_where_the_true_value_is_finite_so_is_the_computed_one(config, values, loss, gradient):
    found = extreme(CONFIGS[config], **values)
    expected = (loss, loss if gradient is ... else gradient)
    assert found == (pytest.approx(expected[0], rel=1e-6), pytest.approx(expected[1], rel=1e-6))


@each_config
@settings(max_examples=40, deadline=None)
@given(
    # No subnormals: whether a process takes them for zero is for its libraries to say.
    p=st.floats(-1e4, 0, width=32, allow_subnormal=False),
    q=st.floats(-1e4, 0, width=32, allow_subnormal=False),
    A=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    w=st.sampled_from([0.0, 1e-30, 1.0, 1e5]),
)
def test_a_finite_value_is_computed_whatever_the_inputs(config, p, q, A, w):
    w = float(np.float32(w))
    one = {
        name: np.array([[value]])
        for name, value in {"p": p, "w": w, "q": q, "A": A, "b": p}.items()
    }
    expected, expected_gradient = (values.item() for values in oracle(config, **one))
    if not math.isfinite(expected) or abs(expected_gradient) > 3e38:
        return
    found, gradient = extreme(config, p=p, q=q, A=A, w=w)
    # Where p and q are nearly the same, terms of order one cancel: their rounding is what is left.
    rounding = 1e-15 * w
    assert found == pytest.approx(expected, rel=1e-9, abs=rounding)
    assert gradient == pytest.approx(expected_gradient, rel=1e-6, abs=1e-37)


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "gspo"])
def test_a_true_value_beyond_all_floats_is_not_finite(name):
    found, gradient = extreme(CONFIGS[name], p=-1, q=-1e4, A=-1)
    assert not math.isfinite(found)
    assert not math.isfinite(gradient)


def test_a_gradient_beyond_float32_is_not_finite():
    found, gradient = extreme(LossConfig("importance_sampling"), p=-1, q=-100, A=1e30)
    assert math.isfinite(found)
    assert gradient == -math.inf


# --- metrics -------------------------------------------------------------------------------------


def data_of(values):
    length = values["w"].shape[1]
    return [
        Datum(
            token_ids=np.zeros(length, np.int32),
            target_token_ids=np.zeros(length, np.int32),
            weights=w.astype(np.float32),
            sampling_logprobs=q.astype(np.float32),
            advantages=A.astype(np.float32),
        )
        for w, q, A in zip(values["w"], values["q"], values["A"], strict=True)
    ]


def rows(values):
    return list(values.astype(np.float32))


RATIOS = {"kl_sampler", "ratio_mean", "ratio_max", "ess"}


@pytest.mark.parametrize(
    ("config", "also"),
    [
        ("cross_entropy", set()),
        ("cross_entropy, truncated", RATIOS | {"truncated_fraction"}),
        ("cross_entropy, KL", {"kl_base"}),
        ("importance_sampling", RATIOS),
        ("importance_sampling, KL measured", RATIOS | {"kl_base"}),
        ("importance_sampling, truncated", RATIOS | {"truncated_fraction"}),
        ("ppo, other bounds", RATIOS | {"clip_fraction"}),
        ("ppo, truncated", RATIOS | {"clip_fraction", "truncated_fraction"}),
        ("cispo, other bounds", RATIOS | {"clip_fraction"}),
        ("dro", RATIOS),
        ("gspo, wide", RATIOS | {"clip_fraction"}),
        ("gspo, truncated", RATIOS | {"clip_fraction", "truncated_fraction"}),
        ("stable_reinforce", RATIOS | {"truncated_fraction", "guarded_fraction"}),
        ("stable_reinforce, KL", RATIOS | {"truncated_fraction", "guarded_fraction", "kl_base"}),
        ("stable_reinforce, unguarded", RATIOS | {"truncated_fraction", "guarded_fraction"}),
    ],
)
def test_metrics_are_those_of_the_contract(config, also):
    config = CONFIGS[config]
    values = drawn(6, (8, 20))
    values["q"] = np.minimum(values["q"] + np.linspace(-1, 1, 8)[:, None], 0)
    values["w"][2] = 0
    data = data_of(values)
    if not RATIOS & also:
        data = [replace(datum, sampling_logprobs=None, advantages=None) for datum in data]
    measured = config.kl_coefficient is not None
    found = metrics(
        config,
        data,
        losses=[-1.5, 2.0, 0.0, 0.25, 0, 0, 0, 0],
        logprobs=rows(values["p"]),
        base_logprobs=rows(values["b"]) if measured else None,
    )
    n, counts = (values["w"] > 0).sum(), values["w"] > 0
    d = (values["p"] - values["q"])[counts]
    d_base = (values["b"] - values["p"])[counts]
    own = np.exp(values["p"] - values["q"])
    if config.loss == "gspo":
        own[:] = [
            [math.exp(np.log(row[mask]).mean()) if mask.any() else 1.0]
            for row, mask in zip(own, counts, strict=True)
        ]
    expected = {
        "loss": 0.75,
        "num_tokens": n,
        "kl_sampler": (np.exp(d) - d - 1).mean(),
        "ratio_mean": np.exp(d).mean(),
        "ratio_max": np.exp(d).max(),
        "ess": np.exp(d).sum() ** 2 / (np.exp(d) ** 2).sum() / n,
        "kl_base": (np.exp(d_base) - d_base - 1).mean(),
        "truncated_fraction": (own[counts] > (config.max_importance_ratio or 2)).mean(),
    }
    if "guarded_fraction" in also:
        difference, nothing = values["p"] - values["q"], np.zeros(20, np.int32)
        out = [
            bool(left_out(config, nothing[mask], row[mask]))
            for row, mask in zip(difference, counts, strict=True)
            if mask.any()
        ]
        expected["guarded_fraction"] = np.mean(out)
        assert config.max_sequence_ratio or 0 < np.mean(out) < 1
    if "clip_fraction" in also:
        low, high = bounds(config)
        above, below, A = own > high, own < low, values["A"]
        acted = above | below if config.loss == "cispo" else above & (A > 0) | below & (A < 0)
        expected["clip_fraction"] = acted[counts].mean()
        assert 0 < expected["clip_fraction"] < 1
    names = {"loss", "num_tokens"} | also
    assert found == pytest.approx({name: expected[name] for name in names}, rel=1e-5)


def test_absent_weights_count_every_position():
    datum = Datum(np.zeros(3, np.int32), np.zeros(3, np.int32))
    found = metrics(
        LossConfig("cross_entropy", entropy=True),
        [datum],
        losses=[1.0],
        logprobs=[np.zeros(3, np.float32)],
        base_logprobs=None,
        entropies=[np.array([1, 2, 6], np.float32)],
    )
    assert found == {"loss": 1.0, "num_tokens": 3.0, "entropy": 3.0}


def test_negative_weights_count_as_positive_ones_do():
    datum = Datum(
        np.zeros(3, np.int32), np.zeros(3, np.int32), weights=np.array([-2, 0, 0.5], np.float32)
    )
    found = metrics(
        LossConfig("cross_entropy", entropy=True),
        [datum],
        losses=[-3.0],
        logprobs=[np.zeros(3, np.float32)],
        base_logprobs=None,
        entropies=[np.array([1, 2, 6], np.float32)],
    )
    assert found == {"loss": -3.0, "num_tokens": 2.0, "entropy": 3.5}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_without_weight_has_means_of_zero(name):
    nothing = np.zeros(1, np.float32)
    datum = Datum(np.zeros(1, np.int32), np.zeros(1, np.int32), nothing, nothing, nothing)
    found = metrics(
        CONFIGS[name],
        [datum, datum],
        losses=[0.0, 0.0],
        logprobs=[nothing - 1] * 2,
        base_logprobs=[nothing] * 2,
        entropies=[nothing] * 2,
    )
    assert set(found.values()) == {0.0}


def test_the_effective_sample_size_of_ratios_beyond_all_floats_is_a_share():
    values = {"w": np.ones((1, 4)), "q": np.array([[-1e4, -1e4, 0, 0]]), "A": np.ones((1, 4))}
    found = metrics(
        LossConfig("dro"),
        data_of(values),
        losses=[0.0],
        logprobs=[np.zeros(4, np.float32)],
        base_logprobs=None,
    )
    assert found["ess"] == 0.5
    assert found["ratio_max"] == math.inf


# --- entropy -------------------------------------------------------------------------------------


def test_entropies_are_those_of_the_softmax(monkeypatch):
    monkeypatch.setattr("services.trainer.losses._MAX_BLOCK_VALUES", 40)
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0)) * 5
    logits[0, 0, 1:] = -math.inf
    logits[0, 1] = -1e4
    logprobs = torch.log_softmax(logits.double(), dim=2)
    expected = -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(dim=2)
    found = entropies(logits)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for place in np.ndindex(3, 5):
        alone = entropies(logits[place][None, None])
        assert torch.equal(alone[0, 0], found[place])


def test_an_entropy_has_the_same_bits_alone_and_among_others_with_several_threads():
    logits = torch.randn(1, 3, 2**16, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = entropies(logits)
        alone = [entropies(logits[:, t : t + 1]) for t in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(alone, dim=1), together)
