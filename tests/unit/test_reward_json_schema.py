"""json_schema: what fits, where it is looked for, and what is no schema."""

from __future__ import annotations

import json

import pytest

from rollmesh.errors import InvalidRequest
from rollmesh.types import ScoreItem
from services.reward.functions.structure import JsonSchema, json_schema

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


def worth(completion, reference="", **parameters):
    checked = JsonSchema.parse(parameters, source="parameters")
    return json_schema(ScoreItem(completion, reference), checked)


@pytest.mark.parametrize(
    ("find", "completion", "expected"),
    [
        pytest.param("whole", '{"name": "Ada", "age": 36}', 1, id="it fits"),
        pytest.param("whole", '  {"name": "Ada"}\n', 1, id="white space around it"),
        pytest.param("whole", '{"name": "Ada", "age": -1}', 0, id="a number out of range"),
        pytest.param("whole", '{"age": 36}', 0, id="a key is missing"),
        pytest.param("whole", '{"name": "Ada", "x": 1}', 0, id="a key too many"),
        pytest.param("whole", '{"name": "Ada"', 0, id="cut off"),
        pytest.param("whole", "{'name': 'Ada'}", 0, id="Python is not JSON"),
        pytest.param("whole", 'Sure: {"name": "Ada"}', 0, id="words before it"),
        pytest.param("whole", "", 0, id="nothing"),
        pytest.param("whole", '{"name": "Ada", "age": NaN}', 0, id="NaN is not JSON"),
        pytest.param("whole", "[" * 100_000, 0, id="nested too deeply"),
        pytest.param("whole", '{"name": "Ada", "age": 1' + "0" * 10_000 + "}", 0, id="too long"),
        pytest.param("fence", 'Sure:\n```json\n{"name": "Ada"}\n```\nBye', 1, id="in a fence"),
        pytest.param("fence", '{"name": "Ada"}', 1, id="no fence, all of it"),
        pytest.param("fence", '```\n1\n```\n```\n{"name": "Ada"}\n```', 1, id="the last fence"),
        pytest.param("first", 'Sure: {"name": "Ada"} {"age": 1}', 1, id="the first object"),
        pytest.param("first", 'f(x) = {x} and {"name": "Ada"}', 1, id="the first that is JSON"),
        pytest.param("first", "nothing {here}", 0, id="no object"),
        pytest.param("first", "{" * 100_000, 0, id="braces alone"),
    ],
)
def test_what_fits_is_worth_1(find, completion, expected):
    assert worth(completion, schema=PERSON, find=find).reward == expected
    assert worth(completion, json.dumps(PERSON), find=find).reward == expected


def test_what_does_not_fit_is_told():
    said = worth('{"name": "Ada", "age": "x"}', schema=PERSON).feedback
    assert said == "$.age: 'x' is not of type 'integer'"


@pytest.mark.parametrize(
    "schema",
    [
        pytest.param({"type": "objekt"}, id="an unknown type"),
        pytest.param({"properties": 1}, id="a wrong keyword"),
        pytest.param({"type": ["string", 1]}, id="a wrong list"),
    ],
)
def test_what_is_no_schema_is_refused_by_name(schema):
    with pytest.raises(InvalidRequest) as caught:
        worth("1", schema=schema)
    assert caught.value.context["field"] in {"", "schema"}
    with pytest.raises(InvalidRequest, match="not a JSON Schema") as caught:
        worth("1", json.dumps(schema))
    assert caught.value.context["field"] == "reference"


def test_a_misspelt_parameter_is_told_by_the_name_that_callers_use():
    with pytest.raises(InvalidRequest, match="did you mean 'schema'"):
        worth("1", shema={})


@pytest.mark.parametrize("reference", ["", "x", "[]", "1"])
def test_a_reference_that_is_no_object_is_refused(reference):
    with pytest.raises(InvalidRequest, match="not a JSON Schema") as caught:
        worth("1", reference)
    assert caught.value.context["field"] == "reference"


@pytest.mark.parametrize(
    "reference",
    ["http://127.0.0.1:9/schema.json", "file:///etc/passwd", "other.json#/x", "#/$defs/none"],
)
def test_a_schema_refers_to_nothing_outside_of_it(reference):
    with pytest.raises(InvalidRequest, match="not within it") as caught:
        worth("1", schema={"$ref": reference})
    assert caught.value.context["field"] == "parameters.schema"


def test_a_schema_that_lies_in_a_file_is_not_read(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text("{}")
    with pytest.raises(InvalidRequest, match="not within it"):
        worth("1", schema={"$ref": file.as_uri()})


def test_a_schema_refers_to_its_own_parts():
    tree = {
        "$ref": "#/$defs/tree",
        "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
    }
    assert worth("[[], [[]]]", schema=tree).reward == 1
    assert worth("[[], [1]]", schema=tree).reward == 0
    assert worth("[" * 900 + "]" * 900, schema=tree).reward in {0, 1}
