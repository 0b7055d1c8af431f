"""Defaults and seeds of a sampler's requests. What is refused: tests/contract."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollmesh.types import SamplingParams
from services.sampler.backends.base import Draw, Model
from services.sampler.validation import mixed, resolve

MODEL = Model(vocab_size=50, max_length=100)


def resolved(params: SamplingParams) -> Draw:
    return resolve(params, 1, 90, MODEL, lambda: 1234)


def test_what_a_request_leaves_out_gets_the_defaults_of_the_protos():
    assert resolved(SamplingParams()) == Draw(
        max_tokens=10,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        seed=mixed(1234),
        stop=(),
        stop_token_ids=(),
        ignore_eos=False,
    )


@pytest.mark.parametrize(
    ("params", "field", "value"),
    [
        (SamplingParams(max_tokens=4), "max_tokens", 4),
        (SamplingParams(max_tokens=400), "max_tokens", 10),
        (SamplingParams(temperature=0), "temperature", 0),
        (SamplingParams(top_k=7), "top_k", 7),
        (SamplingParams(top_k=7000), "top_k", 50),
        (SamplingParams(top_p=1), "top_p", 1),
        (SamplingParams(seed=0), "seed", mixed(0)),
        (SamplingParams(stop=("a",)), "stop", ("a",)),
        (SamplingParams(ignore_eos=True), "ignore_eos", True),
    ],
)
def test_what_a_request_says_is_taken_within_what_the_model_has(params, field, value):
    assert getattr(resolved(params), field) == value


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 1024))
def test_a_mixed_seed_leaves_room_to_count_up(seed, stream):
    assert 0 <= mixed(seed, stream) < 2**62


def test_seeds_that_are_near_each_other_share_no_stream():
    # A backend may count up from a seed, once for each of up to 1,024 completions.
    starts = sorted(mixed(seed) for seed in range(-1000, 1000))
    assert min(b - a for a, b in itertools.pairwise(starts)) > 1024
