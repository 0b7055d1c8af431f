"""Scores batches by named function: the core of the reward service.

No batch ever holds up the event loop or, for longer than one item's bound, anybody else's batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

from rollmesh.errors import FailedPrecondition, InvalidRequest, Overloaded
from rollmesh.telemetry import span, timed
from rollmesh.types import RewardFunctionInfo, ScoreItem
from services.reward.exchange import Exchange
from services.reward.failures import first_of_group
from services.reward.plans import make_plan
from services.reward.scoring import Scoring

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from rollmesh.chat import ItemScore
    from services.reward.exchange import Request, Say
    from services.reward.functions.function import RewardFunction
    from services.reward.plans import Plan
    from services.reward.sandbox import Sandbox
    from services.reward.scoring import Isolation

MAX_ITEMS = 4096
"""Items of one batch."""


class Registry:
    """Reward functions by name.

    Args:
        functions: those that exist.
        isolation: where isolated ones run.
        max_batches: batches scored or waiting at once; one more is refused. Those that ask a judge
            are counted by themselves, with the same bound: they may wait for one for minutes, and
            hold up no others.
        sandbox: where what a model wrote runs; or why there is none.
    """

    def __init__(
        self,
        functions: Mapping[str, RewardFunction[Any]],
        isolation: Isolation,
        *,
        max_batches: int,
        sandbox: Sandbox | str = "none is configured",
    ) -> None:
        self._functions = functions
        self._isolation = isolation
        self._max_batches = max_batches
        # By whether they ask a judge.
        self._num_batches = {False: 0, True: 0}
        self._sandbox = sandbox

    def list_functions(self) -> list[RewardFunctionInfo]:
        """The functions that exist, by name."""
        return [
            RewardFunctionInfo(
                name=name,
                description=function.description,
                parameters_schema_json=json.dumps(function.parameters.model_json_schema()),
                asks_judge=function.asks_judge,
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
            FailedPrecondition: it asks a judge, or needs a sandbox and there is none.
            Overloaded: max_batches are under way.
        """
        plan = self._plan(name, parameters)
        if plan.asks_judge:
            raise FailedPrecondition(
                f"{name} asks a judge: that goes by ScoreEach, where the caller answers for it",
                field="function",
                value=name,
            )
        rewards = [0.0] * len(items)

        async def keep(score: ItemScore) -> None:
            rewards[score.index] = score.reward

        with self._admitted(plan, items):
            await Scoring(plan, self._isolation, self._place(), None).score(items, keep)
        return rewards

    async def score_each(self, requests: AsyncIterator[Request], say: Say) -> None:
        """Score the batch that `requests` begins with: say each item's score when it is done.

        Questions to judges are said too, and `requests` goes on with the answers.

        Raises:
            As `score`; InvalidRequest also for what does not belong where the caller says it.
        """
        exchange = Exchange(requests, say)
        batch = await exchange.batch()
        plan = self._plan(batch.function, batch.parameters)
        with self._admitted(plan, batch.items), first_of_group():
            async with asyncio.TaskGroup() as tasks:
                listening = tasks.create_task(exchange.listen())
                scoring = Scoring(plan, self._isolation, self._place(), exchange.ask)
                await scoring.score(batch.items, exchange.tell)
                listening.cancel()

    def _plan(self, name: str, parameters: Mapping[str, Any]) -> Plan:
        plan = make_plan(self._functions, name, parameters)
        if plan.needs_sandbox and isinstance(self._sandbox, str):
            raise FailedPrecondition(
                f"{name} runs what a model wrote, and this service has no sandbox for it: "
                f"{self._sandbox}",
                field="function",
                value=name,
            )
        return plan

    def _place(self) -> Sandbox | None:
        return None if isinstance(self._sandbox, str) else self._sandbox

    @contextlib.contextmanager
    def _admitted(self, plan: Plan, items: Sequence[ScoreItem]) -> Iterator[None]:
        name = plan.function.name
        if not 1 <= len(items) <= MAX_ITEMS:
            raise InvalidRequest(
                f"items: {len(items)} of them, allowed are 1 to {MAX_ITEMS}",
                field="items",
                value=len(items),
                allowed=f"1 to {MAX_ITEMS}",
            )
        num_batches = self._num_batches[plan.asks_judge]
        if num_batches >= self._max_batches:
            which = "batches that ask a judge" if plan.asks_judge else "batches"
            raise Overloaded(
                f"{num_batches} {which} are being scored or wait, the most that may",
                field="max_batches",
                value=num_batches,
                allowed=self._max_batches,
            )
        self._num_batches[plan.asks_judge] += 1
        try:
            with (
                span("reward.score", function=name, num_items=len(items)),
                timed("rollmesh.reward.score", function=name),
            ):
                yield
        finally:
            self._num_batches[plan.asks_judge] -= 1
