"""What a rule is: a function whose docstring is the rule, and what it comes to."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import grpc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rollmesh.environment.conformance.subject import Subject

Outcome = Literal["passed", "failed", "skipped"]
Function = Callable[["Subject"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule came to for one environment. `reason`: why, where it did not pass."""

    rule: str
    text: str
    outcome: Outcome
    reason: str
    seconds: float


class Broken(Exception):
    """The rule is broken; the text says how."""


class Skipped(Exception):
    """The rule says nothing of this environment; the text says why."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule, and the names of those without which it makes no sense."""

    name: str
    text: str
    needs: tuple[str, ...]
    function: Function

    async def judge(self, subject: Subject, before: Sequence[Verdict]) -> Verdict:
        """What it comes to for `subject`, after the verdicts `before`."""
        start = time.monotonic()
        outcome, reason = await self._judge(subject, before)
        return Verdict(self.name, self.text, outcome, reason, time.monotonic() - start)

    async def _judge(self, subject: Subject, before: Sequence[Verdict]) -> tuple[Outcome, str]:
        outcomes = {verdict.rule: verdict.outcome for verdict in before}
        for need in self.needs:
            if outcomes.get(need) == "failed":
                return "skipped", f"it makes no sense while {need} fails"
            if outcomes.get(need) == "skipped":
                return "skipped", f"it makes no sense where {need} is skipped"
        try:
            await self.function(subject)
        except Skipped as skipped:
            return "skipped", str(skipped)
        except Broken as broken:
            return "failed", str(broken)
        except grpc.aio.AioRpcError as error:
            return "failed", f"the call ended {said(error)}"
        return "passed", ""


def rule(*needs: str) -> Callable[[Function], Rule]:
    """The decorated function as a rule, named as it is, that makes sense after `needs`."""

    def make(function: Function) -> Rule:
        text = re.sub(r"\s+", " ", inspect.getdoc(function) or "")
        return Rule(function.__name__.replace("_", "-"), text, needs, function)

    return make


def said(error: grpc.aio.AioRpcError) -> str:
    """An error status in words."""
    details = (error.details() or "")[:200]
    return f"{error.code().name}: {details}" if details else error.code().name
