"""Cutting and padding of batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollmesh.types import Datum
from services.trainer.batches import Unit, bucket, cut, pad

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=40)


@given(lengths=LENGTHS, budget=st.integers(1, 600))
def test_each_datum_is_in_one_unit_and_no_unit_exceeds_the_budget(lengths, budget):
    units = cut(lengths, max_length=200, max_tokens=budget)
    assert sorted(index for unit in units for index in unit.indices) == list(range(len(lengths)))
    for unit in units:
        assert unit.num_tokens <= budget or len(unit.indices) == 1
        assert {bucket(lengths[index], 200) for index in unit.indices} == {unit.length}


@given(lengths=LENGTHS)
def test_sequences_of_other_lengths_do_not_change_how_those_of_one_are_cut(lengths):
    units = cut(lengths, max_length=200, max_tokens=128)
    for length in {unit.length for unit in units}:
        same = [number for number in lengths if bucket(number, 200) == length]
        alone = [len(unit.indices) for unit in cut(same, max_length=200, max_tokens=128)]
        assert alone == [len(unit.indices) for unit in units if unit.length == length]


@pytest.mark.parametrize(
    ("length", "rounded"),
    [
        (1, 32),
        (32, 32),
        (33, 64),
        (128, 128),
        (129, 192),
        (193, 256),
        (257, 384),
        (385, 512),
        (513, 768),
        (1537, 2000),
        (2000, 2000),
    ],
)
def test_lengths_are_rounded_up_to_few_values_and_never_beyond_the_context(length, rounded):
    assert bucket(length, 2000) == rounded


def test_sequences_of_like_length_go_together_from_the_shortest_to_the_longest():
    assert cut([90, 2, 90, 9, 2], max_length=96, max_tokens=192) == [
        Unit((1, 4, 3), 32),
        Unit((0, 2), 96),
    ]


def test_padding_has_weight_zero_and_absent_weights_are_one():
    long = Datum(np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32))
    short = Datum(
        np.array([5], np.int32),
        np.array([6], np.int32),
        weights=np.array([0.5], np.float32),
        sampling_logprobs=np.array([-1.0], np.float32),
        advantages=np.array([2.0], np.float32),
    )
    chunk = pad([long, short], Unit((1, 0), 4))
    assert (chunk.indices, chunk.lengths) == ((1, 0), (1, 3))
    assert chunk.token_ids_BT.tolist() == [[5, 0, 0, 0], [0, 1, 2, 0]]
    assert chunk.weights_BT.tolist() == [[0.5, 0, 0, 0], [1, 1, 1, 0]]
    assert chunk.advantages_BT.tolist() == [[2, 0, 0, 0], [0, 0, 0, 0]]
