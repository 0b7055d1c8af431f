"""Cuts a batch into units: the padded rectangles that a pass is put together from.

The cut depends on the lengths of the batch alone, never on who else is in a pass, and so does
everything that is computed of a unit: the same batch always gives the same bits.
Padding stands on the right, where causal attention keeps it from every real position, and has
weight 0. Legend: B sequences of a unit, T its positions.
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

# Tokens of a unit, padding included. Small enough that adapters take turns quickly, large enough
# that its adapter's matrix products are worth their calls.
UNIT_TOKENS = 1024
_FINE_STEP = 32
_FINE_END = 128


@dataclass(frozen=True, slots=True)
class Unit:
    """Some data of a batch, by their places in it, as a rectangle of `length` positions each."""

    indices: tuple[int, ...]
    length: int

    @property
    def num_tokens(self) -> int:
        """Positions of the rectangle."""
        return len(self.indices) * self.length


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A unit's data, padded; `lengths` are those without padding."""

    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    token_ids_BT: IntArray
    target_token_ids_BT: IntArray
    weights_BT: FloatArray
    sampling_logprobs_BT: FloatArray
    advantages_BT: FloatArray
    sequence_ids_BT: IntArray


def bucket(length: int, max_length: int) -> int:
    """`length` rounded up: 32, 64, 96, 128, 192, 256, 384, 512, 768, …, at most `max_length`."""
    if length <= _FINE_END:
        rounded = -(-length // _FINE_STEP) * _FINE_STEP
    else:
        power = 1 << (length - 1).bit_length()
        rounded = power * 3 // 4 if length <= power * 3 // 4 else power
    return min(rounded, max_length)


def whole_length(max_length: int) -> int:
    """The longest that units can be in a context of `max_length`: a multiple of 32.

    Then all that is computed over a pass has whole vectors. With units of 7 positions an adapter's
    gradients were seen to change beside others, though its log-probabilities were not.
    """
    return max_length // _FINE_STEP * _FINE_STEP or max_length


def cut(lengths: Sequence[int], *, max_length: int, max_tokens: int = UNIT_TOKENS) -> list[Unit]:
    """The units of a batch, from the shortest to the longest; a sequence is never cut.

    A unit has at most `max_tokens`, unless one sequence has more. No positions are added beyond
    `max_length`: a model may have none there.
    """
    units: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = bucket(lengths[index], max_length)
        if not units or units[-1][0] != length or (len(units[-1][1]) + 1) * length > max_tokens:
            units.append((length, []))
        units[-1][1].append(index)
    return [Unit(tuple(indices), length) for length, indices in units]


def pad(data: Sequence[Datum], unit: Unit) -> Chunk:
    """The data of `unit` as arrays."""
    rows = [data[index] for index in unit.indices]

    def padded(arrays: Sequence[NDArray[Any] | None], dtype: type, default: float) -> NDArray[Any]:
        values: NDArray[Any] = np.zeros((len(rows), unit.length), dtype)
        for row, (array, datum) in enumerate(zip(arrays, rows, strict=True)):
            values[row, : len(datum.token_ids)] = default if array is None else array
        return values

    return Chunk(
        indices=unit.indices,
        lengths=tuple(len(row.token_ids) for row in rows),
        token_ids_BT=padded([row.token_ids for row in rows], np.int32, 0),
        target_token_ids_BT=padded([row.target_token_ids for row in rows], np.int32, 0),
        weights_BT=padded([row.weights for row in rows], np.float32, 1),
        sampling_logprobs_BT=padded([row.sampling_logprobs for row in rows], np.float32, 0),
        advantages_BT=padded([row.advantages for row in rows], np.float32, 0),
        sequence_ids_BT=padded([row.sequence_ids for row in rows], np.int32, 0),
    )
