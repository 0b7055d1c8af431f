"""Rewards for text that fits a regular expression."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from rollmesh.config import Config
from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from rollmesh.types import ScoreItem


class RegexMatch(Config):
    """Parameters of regex_match."""

    pattern: Annotated[str, Field(min_length=1, max_length=4096)]
    """A regular expression in the syntax of Python's `re`."""
    where: Literal["anywhere", "whole"] = "anywhere"
    """Whether it must match somewhere in the completion, or all of it."""
    ignore_case: bool = False
    """Match without regard to case."""


def regex_match(item: ScoreItem, parameters: RegexMatch) -> float:
    """1 where the completion fits the pattern; else 0. The reference is not read."""
    try:
        pattern = re.compile(parameters.pattern, re.IGNORECASE if parameters.ignore_case else 0)
    except (re.error, OverflowError, RecursionError) as error:
        raise InvalidRequest(
            f"{parameters.pattern[:100]!r} is not a regular expression: {error}",
            field="parameters.pattern",
            value=parameters.pattern[:100],
        ) from None
    match = pattern.search if parameters.where == "anywhere" else pattern.fullmatch
    return float(match(item.completion) is not None)
