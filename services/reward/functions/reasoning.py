"""Rewards for the tasks of the package reasoning-gym, by its own scoring."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from rollmesh.config import Config
from rollmesh.errors import InvalidRequest
from services.reward.reasoning import dataset

if TYPE_CHECKING:
    from rollmesh.types import ScoreItem

_ITS_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, SyntaxError,
    TypeError, ValueError,
)  # fmt: skip
_TAG, _END = "<answer>", "</answer>"


class ReasoningGym(Config):
    """Parameters of reasoning_gym."""

    dataset: Annotated[str, Field(min_length=1, max_length=64)]
    """Name of the tasks, e.g. `chain_sum`."""
    config: dict[str, Any] = {}
    """What the tasks are configured with, as their dataset takes it; without `seed` and `size`."""
    find: Literal["tag", "whole"] = "tag"
    """Where in the completion the answer is: within its last `<answer>…</answer>`, and without such
    nowhere; or the whole of it."""


def reasoning_gym(item: ScoreItem, parameters: ReasoningGym) -> float:
    """What reasoning-gym says that the completion's answer to one of its tasks is worth, in [0, 1].

    The reference is the task as a JSON object: the entry with `question`, `answer` and `metadata`
    as reasoning-gym made it; or `seed`, `index` and `size` of the dataset, to make it again.
    """
    given = _reference(item.reference)
    seed, index = given.get("seed", 0), given.get("index")
    try:
        tasks = dataset(parameters.dataset, parameters.config, seed=seed, size=given.get("size", 1))
    except InvalidRequest as error:
        field = f"parameters.{error.context['field']}"
        raise InvalidRequest(str(error), **{**error.context, "field": field}) from None
    try:
        entry = given if index is None else tasks[index]
        # An entry that came through JSON is not always what it was.
        tasks.score_answer(entry["answer"], entry)
    except _ITS_ERRORS as error:
        raise InvalidRequest(
            f"{parameters.dataset} cannot score by it: {type(error).__name__}: {error}"[:500],
            field="reference",
            value=item.reference[:100],
        ) from None
    try:
        worth = float(tasks.score_answer(_answer(item.completion, parameters.find), entry))
    except _ITS_ERRORS:
        return 0.0  # It should take whatever is an answer, and does not.
    return worth if math.isfinite(worth) else 0.0


def _answer(completion: str, find: str) -> str | None:
    if find == "whole":
        return completion.strip()
    start, end = completion.rfind(_TAG), completion.rfind(_END)
    return completion[start + len(_TAG) : end].strip() if 0 <= start < end else None


def _reference(reference: str) -> dict[str, Any]:
    given: Any
    try:
        given = json.loads(reference)
    except (ValueError, RecursionError):
        given = None
    match given:
        case {"question": str(), "answer": _, "metadata": dict()}:
            return dict(given)
        case {"seed": int(), "index": int(index), "size": int(size)} if 0 <= index < size:
            return dict(given)
    raise InvalidRequest(
        "neither an entry of reasoning-gym (question, answer, metadata) nor where to find it "
        "(seed, index, size)",
        field="reference",
        value=reference[:100],
    )
