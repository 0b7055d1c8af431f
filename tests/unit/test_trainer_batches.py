"""Cutting and padding of batches."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rollmesh.types import Datum
from services.trainer.batches import chunks, plan


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40), spare=st.integers(0, 60))
def test_each_datum_is_in_one_chunk_and_no_chunk_exceeds_the_budget(lengths, spare):
    budget = max(lengths) + spare
    planned = plan(lengths, budget)
    assert sorted(index for chunk in planned for index in chunk) == list(range(len(lengths)))
    assert all(len(chunk) * max(lengths[i] for i in chunk) <= budget for chunk in planned)


def test_sequences_of_like_length_go_together():
    assert plan([9, 2, 9, 2, 2], max_tokens=18) == [[1, 3, 4], [0, 2]]


def test_padding_has_weight_zero_and_absent_weights_are_one():
    long = Datum(np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32))
    short = Datum(
        np.array([5], np.int32),
        np.array([6], np.int32),
        weights=np.array([0.5], np.float32),
        sampling_logprobs=np.array([-1.0], np.float32),
        advantages=np.array([2.0], np.float32),
    )
    (chunk,) = chunks([long, short], max_tokens=8)
    assert (chunk.indices, chunk.lengths) == ((1, 0), (1, 3))
    assert chunk.token_ids_BT.tolist() == [[5, 0, 0], [0, 1, 2]]
    assert chunk.weights_BT.tolist() == [[0.5, 0, 0], [1, 1, 1]]
    assert chunk.advantages_BT.tolist() == [[2, 0, 0], [0, 0, 0]]
