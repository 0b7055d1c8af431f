"""What a reward function is.

A function scores one item and knows nothing of batches, processes or the wire. A completion is
what a model wrote, so nothing in it is an error; `reference` and the parameters are the caller's.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from rollmesh.config import Config

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh.types import ScoreItem

P = TypeVar("P", bound=Config)


class NoParameters(Config):
    """For a function that takes none."""


@dataclass(frozen=True, slots=True)
class RewardFunction(Generic[P]):
    """A reward function; its name is that of `score`, its description `score`'s docstring.

    Attributes:
        score: the reward of one item, finite. Raises InvalidRequest with `field` "reference" or
            "parameters.NAME" for what the caller got wrong.
        parameters: the closed model of its parameters.
        isolated: whether its time may explode on some input. It then runs in a process of its own,
            where time and memory are bounded.
        reward_when_stuck: reward of a completion on which an isolated function exceeds its bounds.
            None: the batch is refused.
    """

    score: Callable[[ScoreItem, P], float]
    parameters: type[P]
    isolated: bool = False
    reward_when_stuck: float | None = None

    @property
    def name(self) -> str:
        """What callers call it."""
        return self.score.__name__

    @property
    def description(self) -> str:
        """What it rewards, in plain text."""
        return " ".join(inspect.cleandoc(self.score.__doc__ or "").split())
