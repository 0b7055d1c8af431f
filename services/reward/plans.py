"""What a batch is scored by: a function with parameters that were checked, and its parts.

Whatever the caller got wrong about them is refused here, before any item is looked at.
"""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rollmesh.config import Config
    from services.reward.functions.function import RewardFunction

MAX_FUNCTIONS = 64
"""Of one batch: the function, its parts, their parts, and so on."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What items are scored by.

    Attributes:
        parts: of what it is made up.
        field: where the caller said it, "" or e.g. "parameters.parts[1].".
        reference: what it compares with instead of the item's. None: the item's.
    """

    function: RewardFunction[Any]
    parameters: Config
    parts: tuple[Plan, ...] = ()
    field: str = ""
    reference: str | None = None

    @property
    def asks_judge(self) -> bool:
        """Whether a judge is asked, by itself or a part."""
        return any(plan.function.asks_judge for plan in self.all())

    @property
    def needs_sandbox(self) -> bool:
        """Whether anything runs in the sandbox."""
        return any(plan.function.needs_sandbox for plan in self.all())

    def all(self) -> Iterator[Plan]:
        """Itself, its parts, their parts, and so on."""
        yield self
        for part in self.parts:
            yield from part.all()


def make_plan(
    functions: Mapping[str, RewardFunction[Any]], name: str, parameters: Mapping[str, Any]
) -> Plan:
    """The plan for function `name` with `parameters`.

    Raises:
        InvalidRequest: an unknown function, wrong parameters, or more than MAX_FUNCTIONS; by name.
    """
    return _plan(functions, name, parameters, "", itertools.count(1))


def _plan(
    functions: Mapping[str, RewardFunction[Any]],
    name: str,
    parameters: Mapping[str, Any],
    field: str,
    numbers: Iterator[int],
) -> Plan:
    if next(numbers) > MAX_FUNCTIONS:
        raise InvalidRequest(
            f"parameters: more than {MAX_FUNCTIONS} functions, all parts counted",
            field="parameters",
            allowed=MAX_FUNCTIONS,
        )
    function = _function(functions, name, field)
    checked = _check_parameters(function, parameters, field)
    parts = function.parts(checked) if function.parts else ()
    plans = (
        replace(
            _plan(
                functions,
                part.function,
                part.parameters,
                f"{field}parameters.parts[{index}].",
                numbers,
            ),
            reference=part.reference,
        )
        for index, part in enumerate(parts)
    )
    return Plan(function, checked, tuple(plans), field)


def _function(
    functions: Mapping[str, RewardFunction[Any]], name: str, field: str
) -> RewardFunction[Any]:
    if name in functions:
        return functions[name]
    known = sorted(functions)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InvalidRequest(
        f"{field}function: no reward function {name[:100]!r}; {hint}There are {', '.join(known)}",
        field=f"{field}function",
        value=name[:100],
        allowed=", ".join(known),
    )


def _check_parameters(
    function: RewardFunction[Any], parameters: Mapping[str, Any], field: str
) -> Config:
    source = f"{field}parameters"
    try:
        checked: Config = function.parameters.parse(parameters, source=source)
    except InvalidRequest as error:
        known = function.parameters.model_json_schema().get("properties", {})
        takes = ", ".join(known) or "no parameters"
        raise InvalidRequest(
            f"{error} ({function.name} takes {takes})",
            field=f"{source}.{error.context['field']}".rstrip("."),
            value=error.context["value"],
            allowed=takes,
        ) from None
    return checked
