"""How the transformers backend draws: properties of one draw."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.sampler.backends.base import Draw
from services.sampler.backends.drawing import _at, _uniforms, drawn, likeliest

V = 12


def draw_of(**changes) -> Draw:
    values = {
        "max_tokens": 8,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 5,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": True,
    }
    return Draw(**(values | changes))


def logits_of(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2


DRAWS = st.builds(
    draw_of,
    temperature=st.floats(0.01, 2),
    top_k=st.integers(0, V),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.99),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100)).map(
        lambda bias: tuple(bias.items())
    ),
    logprobs_kind=st.just("sampled"),
    seed=st.integers(0, 2**62 - 1),
)


@given(DRAWS, st.integers(0, 1023), st.integers(0, 500))
def test_what_is_drawn_has_a_probability_above_0_after_every_cut(draw, index, place):
    logits = logits_of(1, V)
    [token_id], [logprob] = drawn(logits, draw, [(index, place)])
    biased = logits[0].double()
    for biased_id, bias in draw.logit_bias:
        biased[biased_id] += bias
    probs = (biased / draw.temperature).softmax(-1)
    likelier = probs > probs[token_id]
    # A little room where a limit lies between two that are equal but for rounding.
    assert draw.top_k == 0 or likelier.sum() < draw.top_k
    assert probs[token_id] >= draw.min_p * probs.max() * (1 - 1e-6)
    kept = probs * (probs >= draw.min_p * probs.max())
    if draw.top_k:
        kept *= probs >= probs.topk(draw.top_k).values[-1]
    assert (kept * likelier).sum() < draw.top_p * kept.sum() + 1e-6
    assert probs[token_id].log() - 1e-6 <= logprob <= 1e-9


@given(DRAWS, st.permutations(range(6)))
def test_a_draw_depends_on_its_own_row_index_and_place_alone(draw, order):
    logits = logits_of(6, V)
    places = [(index, 3 * index) for index in range(6)]
    token_ids, _ = drawn(logits, draw, places)
    shuffled, _ = drawn(logits[order], draw, [places[row] for row in order])
    assert shuffled == [token_ids[row] for row in order]
    for row in range(6):
        assert drawn(logits[row : row + 1], draw, [places[row]])[0] == [token_ids[row]]


@pytest.mark.parametrize("over", ["seed", "index", "place"])
def test_draws_are_spread_as_the_distribution_says_whatever_is_counted_up(over):
    logits = logits_of(1, V)
    count = 4000
    if over == "seed":
        token_ids = [drawn(logits, draw_of(seed=seed), [(0, 0)])[0][0] for seed in range(count)]
    else:
        places = [(n, 7) if over == "index" else (7, n) for n in range(count)]
        token_ids, _ = drawn(logits.expand(count, -1), draw_of(), places)
    probs = logits[0].softmax(-1)
    counts = torch.bincount(torch.tensor(token_ids), minlength=V)
    bounds = 5 * (count * probs * (1 - probs)).sqrt() + 1
    assert ((counts - count * probs).abs() <= bounds).all()
    # Nor does a draw tell what the next one is.
    pairs = torch.zeros(V, V).index_put_(
        (torch.tensor(token_ids[:-1]), torch.tensor(token_ids[1:])), torch.ones(1), accumulate=True
    )
    expected = count * probs[:, None] * probs
    assert ((pairs - expected).abs() <= 6 * expected.sqrt() + 1).all()


def test_greedy_takes_the_likeliest_after_the_bias_and_is_certain_of_it():
    logits = logits_of(3, V)
    draw = draw_of(temperature=0.0, logit_bias=((4, 100.0),), logprobs_kind="sampled")
    assert drawn(logits, draw, [(0, 0)] * 3) == ([4] * 3, [0.0] * 3)
    token_ids, logprobs = drawn(logits, draw_of(temperature=0.0), [(0, 0)] * 3)
    assert token_ids == logits.argmax(-1).tolist()
    assert logprobs == pytest.approx(logits.log_softmax(-1).max(-1).values.tolist())


def test_no_two_places_of_any_completions_share_a_number():
    places = [(index, place) for index in range(30) for place in range(30)]
    numbers = [number for seed in (5, 6) for number in _uniforms(seed, places)]
    assert len(set(numbers)) == 2 * len(places)
    assert all(0 <= number < 1 for number in numbers)


def test_a_token_of_probability_0_is_never_drawn_even_by_the_smallest_number_or_the_largest():
    probs = torch.tensor([[0.0, 0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64)
    assert _at([0.0], probs) == 2
    assert _at([1 - 2**-53], probs) == 4


@pytest.mark.parametrize("kind", ["policy", "sampled"])
@pytest.mark.parametrize(
    ("changes", "num_drawable"),
    [
        ({"temperature": 0.7, "logit_bias": ((3, 5.0),)}, V),
        ({"top_k": 3}, 3),
        ({"temperature": 0.0, "logit_bias": ((3, 50.0),)}, 1),
    ],
)
def test_the_likeliest_are_of_the_kind_and_no_more_than_can_be_drawn(changes, num_drawable, kind):
    draw = draw_of(top_logprobs=5, logprobs_kind=kind, **changes)
    logits = logits_of(2, V)
    ids, values = likeliest(logits, draw)
    token_ids, logprobs = drawn(logits, draw, [(0, 0), (1, 0)])
    num_real = 5 if kind == "policy" else min(num_drawable, 5)
    for row, (own_ids, own_values) in enumerate(zip(ids, values, strict=True)):
        assert own_values == sorted(own_values, reverse=True)
        assert own_ids[num_real:] == [-1] * (5 - num_real)
        assert own_values[num_real:] == [-math.inf] * (5 - num_real)
        assert len(set(own_ids[:num_real])) == num_real
        # Of the token that was drawn, if it is among them, the same value as its own.
        own = dict(zip(own_ids, own_values, strict=True))
        assert own.get(token_ids[row], logprobs[row]) == pytest.approx(logprobs[row], abs=1e-6)
        if kind == "policy":
            best = logits[row].log_softmax(-1).topk(5)
            assert own_ids == best.indices.tolist()
            assert own_values == pytest.approx(best.values.tolist(), abs=1e-6)
