"""Scores the items of one batch, by whatever its functions need: threads, processes, the sandbox.

Items go on side by side, ITEMS_AT_ONCE of them. Where they share what other batches wait for too,
no more of them queue there than can run, so one batch, however large, holds up another by no more
than what runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from rollmesh.chat import ItemScore, Scored
from rollmesh.errors import FailedPrecondition, InvalidRequest
from rollmesh.telemetry import log_fields
from services.reward.failures import first_of_group
from services.reward.functions.function import scored
from services.reward.workers import Stuck

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from rollmesh.chat import Question
    from rollmesh.types import ScoreItem
    from services.reward.plans import Plan
    from services.reward.sandbox import Sandbox

ITEMS_AT_ONCE = 64
"""Items of one batch that are under way at once, where they wait for something."""
SLICE = 256
"""Items of one batch that a thread scores in one go, where they wait for nothing."""

Tell: TypeAlias = "Callable[[ItemScore], Awaitable[None]]"
Ask: TypeAlias = "Callable[[Question], Awaitable[str]]"

log = logging.getLogger(__name__)


class Isolation(Protocol):
    """Runs an isolated function on one item, as `Workers` does."""

    @property
    def count(self) -> int:
        """Items that it scores at once."""
        ...

    async def score(self, function: str, parameters: Mapping[str, Any], item: ScoreItem) -> Scored:
        """The worth; raises InvalidRequest or Stuck."""
        ...


class Scoring:
    """Scores the items of one batch.

    Args:
        plan: what by.
        isolation: where isolated functions run.
        sandbox: where what a model wrote runs. None: nowhere, and no plan here needs it.
        ask: asks a judge. None: there is none, and no plan here needs one.
    """

    def __init__(
        self, plan: Plan, isolation: Isolation, sandbox: Sandbox | None, ask: Ask | None
    ) -> None:
        self._plan = plan
        self._isolation = isolation
        self._turns = asyncio.Semaphore(isolation.count)
        self.sandbox = sandbox
        self.ask = ask

    async def score(self, items: Sequence[ScoreItem], tell: Tell) -> None:
        """Score all `items` and tell each when it is done.

        Raises:
            MeshError: the first item that cannot be scored, by its index.
        """
        function = self._plan.function
        if function.isolated or function.is_asynchronous:
            await self._side_by_side(items, tell)
            return
        for start in range(0, len(items), SLICE):
            part = items[start : start + SLICE]
            for index, worth in enumerate(await asyncio.to_thread(self._here, part, start), start):
                await tell(_item_score(index, worth))

    async def _side_by_side(self, items: Sequence[ScoreItem], tell: Tell) -> None:
        numbered = iter(enumerate(items))

        async def work() -> None:
            for index, item in numbered:
                with _about_item(index):
                    worth = await self.item(self._plan, item)
                await tell(_item_score(index, worth))

        with first_of_group():
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(len(items), ITEMS_AT_ONCE)):
                    tasks.create_task(work())

    def _here(self, items: Sequence[ScoreItem], start: int) -> list[Scored]:
        worths = []
        for index, item in enumerate(items, start):
            with _about_item(index):
                worths.append(_synchronous(self._plan, item))
        return worths

    async def item(self, plan: Plan, item: ScoreItem) -> Scored:
        """What `plan`, the batch's or a part of it, says of `item`."""
        with _as_of(plan):
            if plan.reference is not None:
                item = replace(item, reference=plan.reference)
            if plan.function.isolated:
                return await self._isolated(plan, item)
            if plan.function.is_asynchronous:
                worth: Any = plan.function.score
                return scored(await worth(item, plan.parameters, _Means(self, plan)))
            return await asyncio.to_thread(_synchronous, plan, item)

    async def _isolated(self, plan: Plan, item: ScoreItem) -> Scored:
        values = plan.parameters.model_dump(mode="json")
        async with self._turns:
            try:
                return await self._isolation.score(plan.function.name, values, item)
            except Stuck as stuck:
                return await self._when_stuck(plan, values, item, stuck)

    async def _when_stuck(
        self, plan: Plan, parameters: Mapping[str, Any], item: ScoreItem, stuck: Stuck
    ) -> Scored:
        """The worth of a completion that its function got stuck on, if it alone is to blame."""
        name = plan.function.name
        refusal = InvalidRequest(
            f"{name} cannot score it: {stuck}", field="", value=item.completion[:100]
        )
        if plan.function.reward_when_stuck is None:
            raise refusal
        try:
            # The reference is the caller's, and with this completion it alone can be to blame.
            await self._isolation.score(name, parameters, replace(item, completion="0"))
        except Stuck:
            raise refusal from None
        with log_fields(function=name):
            log.warning("a completion cannot be scored: %s", stuck)
        return Scored(plan.function.reward_when_stuck, feedback=f"not scored: {stuck}")


@dataclass(frozen=True, slots=True)
class _Means:
    """Means of one function, on one item."""

    scoring: Scoring
    plan: Plan

    @property
    def sandbox(self) -> Sandbox:
        assert self.scoring.sandbox is not None  # noqa: S101 - plans that need it are refused
        return self.scoring.sandbox

    async def ask(self, question: Question) -> str:
        assert self.scoring.ask is not None  # noqa: S101 - plans that need it are refused
        return await self.scoring.ask(question)

    async def score_part(self, index: int, item: ScoreItem) -> Scored:
        return await self.scoring.item(self.plan.parts[index], item)


def _synchronous(plan: Plan, item: ScoreItem) -> Scored:
    function: Any = plan.function.score
    return scored(function(item, plan.parameters))


def _item_score(index: int, worth: Scored) -> ItemScore:
    return ItemScore(index, worth.reward, worth.rewards, worth.feedback)


@contextlib.contextmanager
def _as_of(plan: Plan) -> Iterator[None]:
    """An error that a part raised about itself, as the batch's caller needs it."""
    try:
        yield
    except InvalidRequest as error:
        field = error.context.get("field", "")
        of_plan = field.startswith("parameters.") or (
            field == "reference" and plan.reference is not None
        )
        # What a part of this one raised says so already.
        if not of_plan or field.startswith(plan.field):
            raise
        field = f"{plan.field}{field}"
        raise InvalidRequest(str(error), **{**error.context, "field": field}) from None


@contextlib.contextmanager
def _about_item(index: int) -> Iterator[None]:
    """An error that a function raised about one item, as its batch's caller needs it."""
    try:
        yield
    except (InvalidRequest, FailedPrecondition) as error:
        field = error.context.get("field", "")
        # Parameters are the batch's, and answers the call's.
        if not field.startswith(("parameters.", "answer")):
            field = f"items[{index}].{field}".rstrip(".")
        raise type(error)(f"{field}: {error}", **{**error.context, "field": field}) from None
