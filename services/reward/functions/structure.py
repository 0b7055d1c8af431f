"""Rewards for text that is JSON of a given form, checked by the package jsonschema."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal, Self

import jsonschema
from jsonschema.validators import validator_for
from pydantic import ConfigDict, Field, model_validator
from referencing import Registry
from referencing.exceptions import Unresolvable

from rollmesh.chat import Scored
from rollmesh.config import Config
from rollmesh.errors import InvalidRequest
from services.reward.functions.fences import fenced

if TYPE_CHECKING:
    from rollmesh.types import ScoreItem

_MAX_ATTEMPTS = 64
"""Braces in a completion at which an object is looked for: each costs a look at what follows."""


class JsonSchema(Config):
    """Parameters of json_schema."""

    # `schema` is a method of pydantic's models.
    model_config = ConfigDict(serialize_by_alias=True)

    wanted: dict[str, Any] | None = Field(None, alias="schema")
    """JSON Schema that the value must fit, of the draft that its `$schema` names, else 2020-12.
    References lead only to places within it. Absent: the reference is the schema."""
    find: Literal["whole", "fence", "first"] = "whole"
    """Where in the completion the JSON is: the whole of it; its last fenced block, and the whole
    where there is none; or the first object in it that is JSON."""

    @model_validator(mode="after")
    def _a_schema(self) -> Self:
        if self.wanted is not None:
            _check(self.wanted)
        return self


def json_schema(item: ScoreItem, parameters: JsonSchema) -> Scored:
    """1 where the completion holds JSON that fits a JSON Schema; else 0.

    The schema is the parameter, or the reference. What takes too much time to check gets 0.
    """
    wanted = parameters.wanted
    if wanted is None:
        wanted = _schema_in(item.reference)
    found, problem = _value(item.completion, parameters.find)
    if problem:
        return Scored(0.0, feedback=problem)
    # A registry of its own fetches nothing; jsonschema's default would.
    checker = validator_for(wanted, default=jsonschema.Draft202012Validator)
    validator = checker(wanted, registry=Registry())
    try:
        error = jsonschema.exceptions.best_match(validator.iter_errors(found))
    except Unresolvable as unresolvable:
        where = "parameters.schema" if parameters.wanted is not None else "reference"
        raise InvalidRequest(
            f"the schema refers to {unresolvable.ref!r}, which is not within it",
            field=where,
            value=unresolvable.ref,
        ) from None
    except RecursionError:
        return Scored(0.0, feedback="nested too deeply")
    if error is not None:
        return Scored(0.0, feedback=f"{error.json_path}: {error.message}"[:300])
    return Scored(1.0)


def _value(completion: str, find: str) -> tuple[Any, str]:
    """The JSON in a completion; else what is wrong with it."""
    try:
        if find == "first":
            return _first_object(completion)
        text = (fenced(completion) or completion) if find == "fence" else completion
        return _decoder.decode(text.strip()), ""
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"[:300]


def _first_object(completion: str) -> tuple[Any, str]:
    start = -1
    for _ in range(_MAX_ATTEMPTS):
        start = completion.find("{", start + 1)
        if start < 0:
            break
        try:
            return _decoder.raw_decode(completion, start)[0], ""
        except ValueError:
            continue
    return None, "no JSON object in it"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_no_constant)


def _schema_in(reference: str) -> dict[str, Any]:
    try:
        wanted = _decoder.decode(reference)
        if not isinstance(wanted, dict):
            raise ValueError("not an object")  # noqa: TRY301, TRY004 - told as what is wrong with it
        _check(wanted)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"not a JSON Schema, as json_schema needs it where it has no `schema`: {error}"[:500],
            field="reference",
            value=reference[:100],
        ) from None
    return wanted


def _check(wanted: dict[str, Any]) -> None:
    """Raise ValueError where it is no schema."""
    try:
        validator_for(wanted, default=jsonschema.Draft202012Validator).check_schema(wanted)
    except jsonschema.SchemaError as error:
        raise ValueError(f"{error.json_path}: {error.message}"[:300]) from None
