"""Sampled sequences, and which of them stable_reinforce leaves out.

One is left out by its geometric mean ratio, exp of the mean of p − q over its positions that count.
The means are sums from left to right over those positions alone, in float64 on the CPU, so that
neither padding nor other rows change a bit; the loss and its metrics see the same ones.
Legend: B sequences of a unit, T positions, N positions that count.
"""

# ruff: noqa: N803 - shape suffixes

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from rollmesh.types import Datum, IntArray, LossConfig

    Flags = NDArray[np.bool_]

DEFAULT_MAX_RATIO = 1.5
"""Where a config has no max_sequence_ratio; docs/losses.md argues it."""


def unguarded(
    config: LossConfig, counts_BT: Tensor, log_ratios_BT: Tensor, sequence_ids_BT: IntArray | None
) -> Tensor:
    """`counts_BT` without positions of no sampled sequence, and of those that are left out."""
    found: Flags = counts_BT.cpu().numpy().copy()
    if sequence_ids_BT is not None:
        found &= sequence_ids_BT >= 0
    for row, log_ratios in enumerate(log_ratios_BT.cpu().numpy()):
        places = np.flatnonzero(found[row])
        ids = np.zeros(len(places), np.int32)
        if sequence_ids_BT is not None:
            ids = sequence_ids_BT[row, places]
        _, outside = guarded(config, log_ratios[places], ids)
        found[row, places[outside]] = False
    return torch.from_numpy(found).to(counts_BT.device)


def guarded(
    config: LossConfig, log_ratios_N: NDArray[np.float64], sequence_ids_N: IntArray
) -> tuple[Flags, Flags]:
    """Of each sampled sequence, and of each position [N], whether it is left out.

    One whose mean is no number is.
    """
    _, places, lengths = np.unique(sequence_ids_N, return_inverse=True, return_counts=True)
    with np.errstate(invalid="ignore"):
        means = np.bincount(places, log_ratios_N) / lengths
    bound = DEFAULT_MAX_RATIO if config.max_sequence_ratio is None else config.max_sequence_ratio
    outside = ~(np.abs(means) <= math.log(bound))
    return outside, outside[places]


def guarded_fraction(
    config: LossConfig,
    data: Sequence[Datum],
    log_ratios: NDArray[np.float64],
    counts: Sequence[Flags],
) -> float:
    """The share of the sampled sequences of `data` that are left out; 0 where there are none.

    log_ratios: of the positions of all data that count, as `counts` [T] of each says.
    """
    outside: list[Flags] = []
    ends = np.cumsum([count.sum() for count in counts])
    for datum, count, own in zip(data, counts, np.split(log_ratios, ends[:-1]), strict=True):
        ids = np.zeros(len(own), np.int32)
        if datum.sequence_ids is not None:
            ids = datum.sequence_ids[count]
        outside.append(guarded(config, own, ids)[0])
    found = np.concatenate(outside)
    return float(found.sum()) / max(len(found), 1)
