"""Rewards for the text as it stands: equality and length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import PositiveInt, model_validator

from rollmesh.config import Config

if TYPE_CHECKING:
    from rollmesh.types import ScoreItem


class ExactMatch(Config):
    """Parameters of exact_match."""

    strip: bool = True
    """Ignore white space at the start and at the end of both texts."""
    ignore_case: bool = False
    """Compare without regard to case."""


def exact_match(item: ScoreItem, parameters: ExactMatch) -> float:
    """1 where the completion is the reference, character for character; else 0."""
    texts = [item.completion, item.reference]
    if parameters.strip:
        texts = [text.strip() for text in texts]
    if parameters.ignore_case:
        texts = [text.casefold() for text in texts]
    return float(texts[0] == texts[1])


class Length(Config):
    """Parameters of length: exactly one of the two."""

    target: PositiveInt | None = None
    """Characters (Unicode code points) that a completion should have."""
    at_most: PositiveInt | None = None
    """Most characters (Unicode code points) that a completion should have."""

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        if (self.target is None) == (self.at_most is None):
            raise ValueError("exactly one of target and at_most is needed")
        return self


def length(item: ScoreItem, parameters: Length) -> float:
    """A reward in [0, 1] for the completion's length in characters.

    With `target` t: 1 at t, falling linearly to 0 at 0 and at 2t characters. With `at_most` m: 1 up
    to m, then falling linearly to 0 at 2m characters.
    """
    found = len(item.completion)
    if parameters.at_most is not None:
        return min(1.0, max(0.0, 2.0 - found / parameters.at_most))
    assert parameters.target is not None  # noqa: S101 - the model needs one of the two
    return max(0.0, 1.0 - abs(found - parameters.target) / parameters.target)
