"""Rewards for mathematics, compared by meaning with math-verify."""

from __future__ import annotations

from typing import TYPE_CHECKING

import math_verify

from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from rollmesh.types import ScoreItem
    from services.reward.functions.function import NoParameters


def math_match(item: ScoreItem, _: NoParameters) -> float:
    """1 where the completion's answer equals the reference mathematically; else 0.

    The answer is the completion's last formula in LaTeX (boxed before others), else its last number
    or fraction: 1/2, 0.5 and a boxed LaTeX fraction are equal. The reference is a number, a
    fraction, or a formula between dollar signs. A completion that cannot be compared in bounded
    time and memory gets 0.
    """
    # Without math-verify's own time-outs: they are SIGALRM handlers in Python, which a long call
    # into C never lets run. What isolates this function bounds it.
    expected = math_verify.parse(item.reference, parsing_timeout=None)
    if not expected:
        raise InvalidRequest(
            f"{item.reference[:100]!r} is neither a number nor a formula between dollar signs",
            field="reference",
            value=item.reference[:100],
        )
    found = math_verify.parse(item.completion, parsing_timeout=None)
    return float(math_verify.verify(expected, found, timeout_seconds=None))
