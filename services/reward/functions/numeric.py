"""Rewards for plain decimal numbers, compared exactly: no digit is lost to floating point."""

from __future__ import annotations

import decimal
import re
from collections import deque
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, FiniteFloat

from rollmesh.config import Config
from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from rollmesh.types import ScoreItem

# The sign of "3-5" is a minus between two numbers, that of "= -5" belongs to the 5. No part of the
# pattern can match the same digits in two ways, so a search takes time linear in the text.
_NUMBER = re.compile(
    r"(?:(?<![0-9.)])[-+−])?"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
)
# Nothing may raise on what a model wrote: an exponent beyond these makes an infinity.
_EXACT = decimal.Context(
    prec=decimal.MAX_PREC, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, traps=[]
)
# A difference is rounded once it is exact; 1e999999999 - 1 has more digits than fit in memory.
_ROUNDED = decimal.Context(prec=28, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, traps=[])


class NumericMatch(Config):
    """Parameters of numeric_match."""

    tolerance: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    """Largest absolute difference that still counts as equal."""
    where: Literal["last", "whole"] = "last"
    """Whether the completion's number is the last one in it, or must be the whole of it."""


def numeric_match(item: ScoreItem, parameters: NumericMatch) -> float:
    """1 where the completion's number is the reference's, within a tolerance; else 0.

    Numbers are decimal: digits, perhaps with a sign, commas between thousands, a point, and an
    exponent. A completion without a number gets 0. The reference must be one number. Fractions and
    formulas are math_match's.
    """
    expected = _whole(item.reference)
    if expected is None or not expected.is_finite():
        raise InvalidRequest(
            f"{item.reference[:100]!r} is not a number, as numeric_match needs it",
            field="reference",
            value=item.reference[:100],
        )
    if parameters.where == "whole":
        found = _whole(item.completion)
    else:
        last = deque(_NUMBER.finditer(item.completion), maxlen=1)
        found = _decimal(last[0].group()) if last else None
    if found is None:
        return 0.0
    difference = _ROUNDED.abs(_ROUNDED.subtract(found, expected))
    # Through its shortest decimal form: a tolerance of 0.1 means a tenth, not the nearest double.
    return float(difference <= Decimal(repr(parameters.tolerance)))


def _whole(text: str) -> Decimal | None:
    match = _NUMBER.fullmatch(text.strip())
    return _decimal(match.group()) if match else None


def _decimal(number: str) -> Decimal:
    return _EXACT.create_decimal(number.replace(",", "").replace("−", "-"))
