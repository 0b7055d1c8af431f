"""Answers and actions of a client that does not know the game: tame ones, and odd ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rollmesh.api.environment.v1 import environment_service_pb2 as pb

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

TAME = ("1", "up", "a", "yes", "42")
ODD = (
    "",
    " ",
    "x" * 100_000,
    "\x00\x07\r\n\t",
    "ü😀\u202e\ufeff",
    "-1e999",
    "NaN",
    '{"a": [1, {"b": null}]}',
    "<answer>1</answer>",
    "%s %d {0} ${HOME} `id` ; ' OR 1=1 --",
    "9" * 5_000,
)
_BAD_ARGUMENTS = ("", "{", "[]", "null", '"x"', "{}", '{"no-such-argument": 1}', "[" * 500)
_MAX_DEPTH = 6
"""Of a schema's nesting; below it, whatever is simplest."""


def text(content: str) -> pb.Message:
    """An action of text alone."""
    return pb.Message(role="assistant", content=content)


def calls(*named: tuple[str, str]) -> pb.Message:
    """An action that calls tools: names, and arguments as JSON."""
    return pb.Message(
        role="assistant",
        tool_calls=[
            pb.ToolCall(id=f"call_{index}", name=name, arguments_json=arguments)
            for index, (name, arguments) in enumerate(named)
        ],
    )


def tame(tools: Sequence[pb.Tool], rng: random.Random) -> pb.Message:
    """An action as a well-meaning model's: text, or one call whose arguments fit."""
    if tools and rng.random() < 0.5:
        tool = rng.choice(tools)
        return calls((tool.name, json.dumps(arguments(tool, rng))))
    return text(rng.choice(TAME))


def odd(tools: Sequence[pb.Tool], rng: random.Random) -> list[pb.Message]:
    """Actions of which none may end an episode with an error."""
    made = [text(content) for content in ODD]
    made += [calls(("no-such-tool", "{}")), calls(("", ""))]
    for tool in tools:
        made += [calls((tool.name, bad)) for bad in _BAD_ARGUMENTS]
        fitting = json.dumps(arguments(tool, rng))
        made.append(calls((tool.name, fitting), (tool.name, fitting), ("no-such-tool", fitting)))
        made.append(pb.Message(role="assistant", content="1", tool_calls=made[-1].tool_calls[:1]))
    return made


def arguments(tool: pb.Tool, rng: random.Random) -> dict[str, Any]:
    """Arguments that fit the tool's schema, as far as its simple keywords say."""
    try:
        schema = json.loads(tool.parameters_schema_json or "{}")
        value = _example(schema, schema, rng, _MAX_DEPTH)
    except (ValueError, TypeError, AttributeError, LookupError):  # It is no schema.
        return {}
    return value if isinstance(value, dict) else {}


def _example(schema: Any, root: Any, rng: random.Random, depth: int) -> Any:
    if not isinstance(schema, dict) or depth == 0:
        return None
    schema = _resolved(schema, root)
    given = [schema["const"]] if "const" in schema else schema.get("enum")
    if given:
        return rng.choice(given)
    choice = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    if choice:
        return _example(choice[0], root, rng, depth - 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    make = _MAKERS.get(kind[0] if isinstance(kind, list) else kind, _string)
    return make(schema, root, rng, depth - 1)


def _object(schema: dict[str, Any], root: Any, rng: random.Random, depth: int) -> Any:
    properties = schema.get("properties", {})
    return {name: _example(each, root, rng, depth) for name, each in properties.items()}


def _array(schema: dict[str, Any], root: Any, rng: random.Random, depth: int) -> Any:
    count = max(1, int(schema.get("minItems", 1)))
    return [_example(schema.get("items", {}), root, rng, depth) for _ in range(count)]


def _string(schema: dict[str, Any], _root: Any, rng: random.Random, _depth: int) -> Any:
    return rng.choice(TAME).ljust(int(schema.get("minLength", 0)), "a")


def _number(schema: dict[str, Any], _root: Any, rng: random.Random, _depth: int) -> Any:
    low = int(schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1))
    high = int(schema.get("maximum", schema.get("exclusiveMaximum", low + 11) - 1))
    return rng.randint(low, max(low, high))


def _boolean(_schema: dict[str, Any], _root: Any, rng: random.Random, _depth: int) -> Any:
    return rng.random() < 0.5


def _null(_schema: dict[str, Any], _root: Any, _rng: random.Random, _depth: int) -> Any:
    return None


_MAKERS = {
    "object": _object,
    "array": _array,
    "integer": _number,
    "number": _number,
    "boolean": _boolean,
    "null": _null,
}


def _resolved(schema: dict[str, Any], root: Any) -> dict[str, Any]:
    """`schema`, or what it refers to in the same document."""
    reference = schema.get("$ref")
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return schema
    found = root
    for part in reference.removeprefix("#/").split("/"):
        found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}
