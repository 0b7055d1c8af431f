"""What a rule is: a function whose docstring is the rule, and what it comes to."""

from __future__ import annotations

import inspect
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
    """What a rule came to for one environment.

    Attributes:
        rule: its name.
        text: the rule.
        outcome: whether it passed.
        reason: why, where it did not.
        skipped_with: a rule without which this one makes no sense; empty: it is not skipped so.
        seconds: how long that took.
    """

    rule: str
    text: str
    outcome: Outcome
    reason: str
    skipped_with: str
    seconds: float


class Broken(Exception):
    """The rule is broken; the text says how."""


class Skipped(Exception):
    """The rule says nothing of this environment; the text says why."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule: in a sentence, in detail, and the names of those that it makes no sense without."""

    name: str
    text: str
    detail: str
    needs: tuple[str, ...]
    function: Function

    async def judge(self, subject: Subject, before: Sequence[Verdict]) -> Verdict:
        """What it comes to for `subject`, after the verdicts `before`."""
        missing = {verdict.rule: verdict for verdict in before if verdict.outcome != "passed"}
        for need in self.needs:
            if need in missing:
                first = missing[need].skipped_with or need
                how = "fails" if missing[first].outcome == "failed" else "is skipped"
                reason = f"it makes no sense where {first} {how}"
                return Verdict(self.name, self.text, "skipped", reason, first, 0.0)
        start = time.monotonic()
        outcome, reason = await self._judge(subject)
        return Verdict(self.name, self.text, outcome, reason, "", time.monotonic() - start)

    async def _judge(self, subject: Subject) -> tuple[Outcome, str]:
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
        text, _, detail = (inspect.getdoc(function) or "").partition("\n\n")
        name = function.__name__.replace("_", "-")
        return Rule(name, text, " ".join(detail.split()), needs, function)

    return make


def said(error: grpc.aio.AioRpcError) -> str:
    """An error status in words."""
    details = (error.details() or "")[:200]
    return f"{error.code().name}: {details}" if details else error.code().name
