"""Rewards made up of others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from rollmesh.chat import Scored
from rollmesh.config import Config
from services.reward.functions.function import Part

if TYPE_CHECKING:
    from rollmesh.types import ScoreItem
    from services.reward.functions.function import Means


class WeightedPart(Config):
    """One part of weighted."""

    function: str
    """Name of its reward function."""
    parameters: dict[str, Any] = {}
    """Its parameters."""
    weight: Annotated[FiniteFloat, Field(ge=-1e6, le=1e6)] = 1.0
    """What its reward is multiplied with. Negative: a penalty."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{0,63}$")] = ""
    """Name that its reward is told under. Empty: the function's."""
    reference: str | None = None
    """What it compares with. Absent: the item's reference."""
    at_least: FiniteFloat | None = None
    """Makes it a gate: where its own reward is less, the whole is worth 0, and the parts after it
    are not looked at."""

    @property
    def label(self) -> str:
        """Name that its reward is told under."""
        return self.name or self.function


class Weighted(Config):
    """Parameters of weighted."""

    parts: Annotated[tuple[WeightedPart, ...], Field(min_length=1, max_length=16)]
    """What it is made up of. Cheap gates first save the rest."""
    combine: Literal["sum", "product"] = "sum"
    """What the weighted rewards of the parts are combined to."""

    @model_validator(mode="after")
    def _told_apart(self) -> Self:
        names = [part.label for part in self.parts]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"parts: {twice!r} is there twice; give each a `name`")
        return self


def parts_of(parameters: Weighted) -> list[Part]:
    """The functions that it is made up of."""
    return [Part(part.function, part.parameters, part.reference) for part in parameters.parts]


async def weighted(item: ScoreItem, parameters: Weighted, means: Means) -> Scored:
    """The sum, or the product, of other functions' rewards, each multiplied with its weight.

    Each part's own reward is told by its name, a part's parts as NAME/PART. Parts may ask a judge,
    run in the sandbox, and be `weighted` themselves.
    """
    rewards: dict[str, float] = {}
    feedback = []
    terms = []
    for index, part in enumerate(parameters.parts):
        worth = await means.score_part(index, item)
        rewards[part.label] = worth.reward
        rewards |= {f"{part.label}/{name}": value for name, value in worth.rewards.items()}
        if worth.feedback:
            feedback.append(f"{part.label}: {worth.feedback}")
        if part.at_least is not None and worth.reward < part.at_least:
            return Scored(0.0, rewards, "\n".join([*feedback, f"{part.label}: below its gate"]))
        terms.append(part.weight * worth.reward)
    total = math.fsum(terms) if parameters.combine == "sum" else math.prod(terms)
    return Scored(total, rewards, "\n".join(feedback))
