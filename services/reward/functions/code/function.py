"""code_tests: Python that a model wrote, by the tests that it passes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from rollmesh.chat import Scored
from rollmesh.config import Config
from rollmesh.errors import InvalidRequest
from services.reward.functions.code.cases import run_case
from services.reward.functions.code.reference import code_reference
from services.reward.functions.code.units import run_tests
from services.reward.functions.fences import fenced
from services.reward.sandbox import Limits

if TYPE_CHECKING:
    from rollmesh.types import ScoreItem
    from services.reward.functions.code.reference import CodeReference
    from services.reward.functions.function import Means
    from services.reward.sandbox import Place, Sandbox

MAX_CODE = 1 << 20
"""Characters of code that a completion may have."""
_MAX_FEEDBACK = 20
"""Failures that are told."""


class CodeTests(Config):
    """Parameters of code_tests."""

    reward: Literal["share", "all"] = "share"
    """The share of tests and cases that pass; or 1 where all of them do, else 0."""
    find: Literal["whole", "fence"] = "fence"
    """Where in the completion the code is: the whole of it; or its last fenced block, and the whole
    where there is none."""
    names: Annotated[tuple[str, ...], Field(max_length=64)] = ()
    """What the completion is to define though Python has it already, e.g. `sum`. Other names that
    the tests use and nobody else defines need not be told."""
    in_place: bool = False
    """Whether tests see what the completion does to lists, dicts and sets that they hand to it.
    Then it could also change what they compare with."""
    cpu_s: Annotated[float, Field(gt=0)] = 5.0
    """Processor time in seconds that the completion has for one test or case, rounded up. Then it
    fails; so it does when it waits for 10 s beyond that."""
    memory_mib: Annotated[int, Field(ge=32)] = 256
    """Memory that it has, in MiB."""


async def code_tests(item: ScoreItem, parameters: CodeTests, means: Means) -> Scored:
    """The share of the reference's tests that the completion's Python passes, in [0, 1].

    It runs in the sandbox, newly begun for each test. The tests run in another one, and know what
    it defines by its values: numbers, strings, containers of them. The reference is tests in Python
    (asserts, or functions `test…`), or a JSON object with `tests`, `setup`, and `cases` of stdin
    and stdout for a program.
    """
    limits = _limits(parameters, means.sandbox)
    reference = code_reference(item.reference)
    code = fenced(item.completion) if parameters.find == "fence" else None
    code = item.completion if code is None else code
    if len(code) > MAX_CODE:
        return Scored(0.0, feedback=f"longer than {MAX_CODE} characters")
    tally = _Tally(stops=parameters.reward == "all")
    async with means.sandbox.place() as place:
        await _judge(tally, place, code, reference, parameters, limits)
    return tally.scored()


class _Tally:
    """How many passed, and what the others failed by. `stops`: at the first of them."""

    def __init__(self, *, stops: bool) -> None:
        self._stops = stops
        self._num_passed = 0
        self._failures: list[str] = []
        self.num_expected = 0

    def add(self, name: str, problem: str) -> None:
        """One more; `problem` empty: it passed."""
        if problem:
            self._failures.append(f"{name}: {problem}")
        else:
            self._num_passed += 1

    @property
    def is_decided(self) -> bool:
        """Whether no other can change anything."""
        return self._stops and bool(self._failures)

    def scored(self) -> Scored:
        """The worth."""
        share = self._num_passed / self.num_expected
        told = self._failures[:_MAX_FEEDBACK]
        left_out = len(self._failures) - len(told)
        if left_out:
            told.append(f"and {left_out} more")
        reward = float(share == 1) if self._stops else share
        return Scored(reward, feedback="\n".join(told))


async def _judge(
    tally: _Tally,
    place: Place,
    code: str,
    reference: CodeReference,
    parameters: CodeTests,
    limits: Limits,
) -> None:
    tally.num_expected = len(reference.cases)
    if reference.tests:
        results = run_tests(
            place, code, reference, limits, names=parameters.names, in_place=parameters.in_place
        )
        async with contextlib.aclosing(results):
            async for name, problem in results:
                if not name:
                    tally.num_expected += int(problem)
                    continue
                tally.add(name, problem)
                if tally.is_decided:
                    return
    for index, case in enumerate(reference.cases):
        tally.add(f"cases[{index}]", await run_case(place, code, case, limits))
        if tally.is_decided:
            return


def _limits(parameters: CodeTests, sandbox: Sandbox) -> Limits:
    memory_bytes = parameters.memory_mib << 20
    for field, value, most in (
        ("cpu_s", parameters.cpu_s, sandbox.max_cpu_s),
        ("memory_mib", parameters.memory_mib, sandbox.max_memory_bytes >> 20),
    ):
        if value > most:
            raise InvalidRequest(
                f"parameters.{field}: {value:g} is more than this service allows, {most:g}",
                field=f"parameters.{field}",
                value=value,
                allowed=most,
            )
    return Limits(cpu_s=parameters.cpu_s, memory_bytes=memory_bytes)
