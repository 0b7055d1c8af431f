"""Cuts a batch into padded rectangles that fit one pass.

Padding stands on the right, where causal attention keeps it from every real position, and has
weight 0. Legend: B sequences of a chunk, T positions of its longest.
"""

# ruff: noqa: N815 - shape suffixes

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from rollmesh.types import Datum, FloatArray, IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Some data of a batch, padded; `indices` are their places in the batch, `lengths` their T."""

    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    token_ids_BT: IntArray
    target_token_ids_BT: IntArray
    weights_BT: FloatArray
    sampling_logprobs_BT: FloatArray
    advantages_BT: FloatArray


def chunks(data: Sequence[Datum], max_tokens: int) -> list[Chunk]:
    """`data` cut into chunks of at most `max_tokens`, padding included; no datum is longer.

    The cut depends on the lengths alone, so that the same batch always gives the same bits.
    """
    return [pad(data, indices) for indices in plan([len(d.token_ids) for d in data], max_tokens)]


def plan(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of each chunk, from the shortest to the longest, so that little is padded."""
    planned: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if planned[-1] and (len(planned[-1]) + 1) * lengths[index] > max_tokens:
            planned.append([])
        planned[-1].append(index)
    return planned


def pad(data: Sequence[Datum], indices: Sequence[int]) -> Chunk:
    """The data at `indices` as one chunk."""
    rows = [data[index] for index in indices]
    lengths = tuple(len(row.token_ids) for row in rows)

    def padded(arrays: Sequence[NDArray[Any] | None], dtype: type, default: float) -> NDArray[Any]:
        values: NDArray[Any] = np.zeros((len(rows), max(lengths)), dtype)
        for row, (array, length) in enumerate(zip(arrays, lengths, strict=True)):
            values[row, :length] = default if array is None else array
        return values

    return Chunk(
        indices=tuple(indices),
        lengths=lengths,
        token_ids_BT=padded([row.token_ids for row in rows], np.int32, 0),
        target_token_ids_BT=padded([row.target_token_ids for row in rows], np.int32, 0),
        weights_BT=padded([row.weights for row in rows], np.float32, 1),
        sampling_logprobs_BT=padded([row.sampling_logprobs for row in rows], np.float32, 0),
        advantages_BT=padded([row.advantages for row in rows], np.float32, 0),
    )
