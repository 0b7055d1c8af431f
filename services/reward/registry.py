"""Scores batches by named function: the core of the reward service.

Cheap functions run in a thread, isolated ones in processes with bounded time and memory, so that
no batch ever holds up the event loop or, for longer than one item's bound, anybody else's batch.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from rollmesh.errors import InvalidRequest, Overloaded
from rollmesh.telemetry import log_fields, span, timed
from rollmesh.types import RewardFunctionInfo, ScoreItem
from services.reward.workers import Stuck

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rollmesh.config import Config
    from services.reward.functions.function import RewardFunction

MAX_ITEMS = 4096
"""Items of one batch."""

log = logging.getLogger(__name__)


class Isolation(Protocol):
    """Runs an isolated function on one item, as `Workers` does."""

    async def score(self, function: str, parameters: Mapping[str, Any], item: ScoreItem) -> float:
        """The reward; raises InvalidRequest or Stuck."""
        ...


class Registry:
    """Reward functions by name.

    Args:
        functions: those that exist.
        isolation: where isolated ones run.
        max_batches: batches scored or waiting at once; one more is refused.
    """

    def __init__(
        self,
        functions: Mapping[str, RewardFunction[Any]],
        isolation: Isolation,
        *,
        max_batches: int,
    ) -> None:
        self._functions = functions
        self._isolation = isolation
        self._max_batches = max_batches
        self._num_batches = 0

    def list_functions(self) -> list[RewardFunctionInfo]:
        """The functions that exist, by name."""
        return [
            RewardFunctionInfo(
                name=name,
                description=function.description,
                parameters_schema_json=json.dumps(function.parameters.model_json_schema()),
            )
            for name, function in sorted(self._functions.items())
        ]

    async def score(
        self, name: str, parameters: Mapping[str, Any], items: Sequence[ScoreItem]
    ) -> list[float]:
        """The rewards of `items`, in order, each finite.

        Raises:
            InvalidRequest: an unknown function, wrong parameters, a bad number of items, or an item
                that cannot be scored; the message says which and what is allowed.
            Overloaded: max_batches are under way.
        """
        function = self._function(name)
        checked = _check_parameters(function, parameters)
        if not 1 <= len(items) <= MAX_ITEMS:
            raise InvalidRequest(
                f"items: {len(items)} of them, allowed are 1 to {MAX_ITEMS}",
                field="items",
                value=len(items),
                allowed=f"1 to {MAX_ITEMS}",
            )
        if self._num_batches >= self._max_batches:
            raise Overloaded(
                f"{self._num_batches} batches are being scored or wait, the most that may",
                field="max_batches",
                value=self._num_batches,
                allowed=self._max_batches,
            )
        self._num_batches += 1
        try:
            with (
                span("reward.score", function=name, num_items=len(items)),
                timed("rollmesh.reward.score", function=name),
            ):
                if function.isolated:
                    return await self._score_isolated(function, checked, items)
                return await asyncio.to_thread(_score_here, function, checked, items)
        finally:
            self._num_batches -= 1

    def _function(self, name: str) -> RewardFunction[Any]:
        if name in self._functions:
            return self._functions[name]
        known = sorted(self._functions)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InvalidRequest(
            f"function: no reward function {name[:100]!r}; {hint}There are {', '.join(known)}",
            field="function",
            value=name[:100],
            allowed=", ".join(known),
        )

    async def _score_isolated(
        self, function: RewardFunction[Any], parameters: Config, items: Sequence[ScoreItem]
    ) -> list[float]:
        values = parameters.model_dump(mode="json")
        rewards = []
        for index, item in enumerate(items):
            try:
                rewards.append(await self._isolation.score(function.name, values, item))
            except InvalidRequest as error:
                raise _in_item(index, error) from None
            except Stuck as stuck:
                rewards.append(await self._reward_when_stuck(function, values, index, item, stuck))
        return rewards

    async def _reward_when_stuck(
        self,
        function: RewardFunction[Any],
        parameters: Mapping[str, Any],
        index: int,
        item: ScoreItem,
        stuck: Stuck,
    ) -> float:
        """The reward of a completion that its function got stuck on, if it alone is to blame."""
        refusal = InvalidRequest(
            f"items[{index}]: {function.name} cannot score it: {stuck}",
            field=f"items[{index}]",
            value=item.completion[:100],
        )
        if function.reward_when_stuck is None:
            raise refusal
        try:
            # The reference is the caller's, and with this completion it alone can be to blame.
            await self._isolation.score(function.name, parameters, replace(item, completion="0"))
        except Stuck:
            raise refusal from None
        with log_fields(function=function.name):
            log.warning("a completion cannot be scored: %s", stuck)
        return function.reward_when_stuck


def _score_here(
    function: RewardFunction[Any], parameters: Config, items: Sequence[ScoreItem]
) -> list[float]:
    rewards = []
    for index, item in enumerate(items):
        try:
            rewards.append(function.score(item, parameters))
        except InvalidRequest as error:
            raise _in_item(index, error) from None
    return rewards


def _check_parameters(function: RewardFunction[Any], parameters: Mapping[str, Any]) -> Config:
    try:
        checked: Config = function.parameters.parse(parameters, source="parameters")
    except InvalidRequest as error:
        known = function.parameters.model_json_schema().get("properties", {})
        takes = ", ".join(known) or "no parameters"
        raise InvalidRequest(
            f"{error} ({function.name} takes {takes})",
            field=f"parameters.{error.context['field']}".rstrip("."),
            value=error.context["value"],
            allowed=takes,
        ) from None
    return checked


def _in_item(index: int, error: InvalidRequest) -> InvalidRequest:
    """`error`, which a function raised about one item, as its batch's caller needs it."""
    field = error.context["field"]
    if not field.startswith("parameters."):
        field = f"items[{index}].{field}"
    return InvalidRequest(f"{field}: {error}", **{**error.context, "field": field})
