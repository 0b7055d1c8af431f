"""What a reference says about code: its tests, and its cases of input and output."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, ValidationError

from rollmesh.config import Config, explain
from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from typing import NoReturn

MAX_REFERENCE = 4 << 20
"""Characters of one reference."""
MAX_TESTS = 256
"""Tests, and cases, of one reference."""


class Case(Config):
    """The completion as a program: what it reads, and what it is to write."""

    stdin: str = ""
    """What it reads."""
    stdout: str
    """What it is to write. White space at the ends of lines, and after the last, does not count."""


class CodeReference(Config):
    """A reference of code_tests, as a JSON object."""

    tests: str | Annotated[tuple[str, ...], Field(max_length=MAX_TESTS)] = ()
    """Python that uses what the completion defines, and fails where it is wrong. A list: each of
    it is a test. A text: each of its functions `test…` is one; without such, each of its asserts
    where it has nothing else, else all of it."""
    setup: str = ""
    """Python that runs before each test."""
    cases: Annotated[tuple[Case, ...], Field(max_length=MAX_TESTS)] = ()
    """Input and output of the completion as a program."""


def code_reference(reference: str) -> CodeReference:
    """What `reference` says: a JSON object, or else Python, which is the `tests`.

    Raises:
        InvalidRequest: another object, or nothing to test.
    """
    if len(reference) > MAX_REFERENCE:
        _refuse(f"it is longer than {MAX_REFERENCE} characters", reference)
    try:
        values = json.loads(reference)
    except (ValueError, RecursionError):
        values = {"tests": reference}
    if not isinstance(values, dict):
        values = {"tests": reference}
    try:
        found = CodeReference.model_validate(values)
    except ValidationError as error:
        problem = explain(error, CodeReference, source="code_tests cannot read it")
        _refuse(str(problem), reference)
    if not found.cases and not (found.tests and "".join(found.tests).strip()):
        _refuse("there are neither tests nor cases, and code_tests needs some", reference)
    return found


def _refuse(problem: str, reference: str) -> NoReturn:
    raise InvalidRequest(problem, field="reference", value=reference[:100])
