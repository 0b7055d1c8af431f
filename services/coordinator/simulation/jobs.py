"""What a modelled job does, and how long its completions are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from random import Random


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a completion: uniform from `low` to `high`, or lognormal.

    Lognormal: `low` is the median, one in a hundred is longer than `high`, none than `max_tokens`.
    """

    kind: Literal["uniform", "lognormal"]
    low: int
    high: int
    max_tokens: int

    @property
    def typical(self) -> float:
        """Their mean, without the bound."""
        if self.kind == "uniform":
            return (self.low + self.high) / 2
        return self.low * math.exp(self._sigma**2 / 2)

    @property
    def _sigma(self) -> float:
        # 99 % of a normal distribution are below 2.326 times its deviation.
        return math.log(self.high / self.low) / 2.326

    def draw(self, random: Random) -> int:
        """One length."""
        if self.kind == "uniform":
            return random.randint(self.low, self.high)
        drawn = round(random.lognormvariate(math.log(self.low), self._sigma))
        return max(1, min(self.max_tokens, drawn))


@dataclass(frozen=True, slots=True)
class JobModel:
    """A managed job. Rewards of a group take `reward_s`, exponentially spread over a floor.

    `submitted_s`: when. `priority`: its class.
    """

    name: str
    project: str
    steps: int
    groups_per_step: int
    group_size: int
    prompt_tokens: int
    lengths: Lengths
    reward_s: float = 0.0
    max_staleness: int = 0
    priority: int = 0
    submitted_s: float = 0.0

    def draw_reward_s(self, random: Random) -> float:
        """How long it takes to score one group: half of it always, the rest at random."""
        return self.reward_s / 2 + random.expovariate(2 / self.reward_s) if self.reward_s else 0.0
