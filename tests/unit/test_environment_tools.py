"""Tools made of typed functions: what the model is told of them, and how its calls are run."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

import pytest
from pydantic import Field

from rollmesh.chat import Message, Task, ToolCall
from rollmesh.environment import Episode
from rollmesh.environment.tools import Toolbox, tool_of


def add(a: int, b: Annotated[int, Field(ge=0, description="At least 0.")] = 1) -> int:
    """Adds.

    Two numbers.
    """
    return a + b


async def shout(text: str, how: Literal["up", "down"]) -> str:
    if how == "down":
        raise ValueError("not down")
    return text.upper()


def remember(episode: Episode, word: str) -> dict[str, object]:
    episode.state = [*(episode.state or []), word]
    return {"words": episode.state}


def divide(by: int) -> float:
    return 1 / by


def where() -> str:
    return threading.current_thread().name


class NoWire:
    async def receive(self):
        raise AssertionError

    async def send(self, response):
        raise AssertionError


@pytest.fixture
def episode():
    made = {f.__name__: tool_of(f) for f in (add, shout, remember, divide, where)}
    with ThreadPoolExecutor(1, thread_name_prefix="tools") as threads:
        yield Episode(Task("t"), 0, wire=NoWire(), max_turns=1, toolbox=Toolbox(made, threads))


def test_the_schema_and_the_description_are_those_of_the_function():
    tool = tool_of(add).tool
    assert (tool.name, tool.description) == ("add", "Adds.\n\nTwo numbers.")
    assert json.loads(tool.parameters_schema_json) == {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"type": "integer", "minimum": 0, "default": 1, "description": "At least 0."},
        },
        "required": ["a"],
        "additionalProperties": False,
    }
    assert "episode" not in tool_of(remember).tool.parameters_schema_json


@pytest.mark.parametrize(
    ("name", "arguments", "content"),
    [
        ("add", '{"a": 37, "b": 58}', "95"),
        ("add", '{"a": 37}', "38"),
        ("shout", '{"text": "ü", "how": "up"}', "Ü"),
        ("remember", '{"word": "x"}', '{"words":["x"]}'),
        ("where", "", "tools_0"),
        ("divide", '{"by": 4}', "0.25"),
        # What a model may get wrong.
        ("shout", '{"text": "a", "how": "down"}', "error: not down"),
        ("add", '{"b": 1}', "error: a: Field required"),
        ("add", '{"a": "x"}', "error: a: Input should be a valid integer"),
        ("add", '{"a": 1, "b": -1}', "error: b: Input should be greater than or equal to 0"),
        ("add", '{"a": 1, "c": 2}', "error: c: Extra inputs are not permitted"),
        ("add", "[1, 2]", "error: Input should be an object"),
        ("add", "{", "error: Invalid JSON"),
        ("add", "[" * 10_000, "error: Invalid JSON"),
        ("remember", '{"word": "x", "episode": {}}', "error: episode: Extra inputs"),
        ("sub", "{}", "error: no tool 'sub', there is add, shout, remember, divide, where"),
        ("", "{}", "error: no tool ''"),
    ],
)
async def test_a_call_is_answered_by_a_message_of_its_tool(episode, name, arguments, content):
    action = Message("assistant", tool_calls=(ToolCall("id-7", name, arguments),))
    (message,) = await episode.call_tools(action)
    assert (message.role, message.tool_call_id) == ("tool", "id-7")
    assert message.content.startswith(content)
    assert len(message.content) < 200


async def test_many_calls_are_answered_in_their_order(episode):
    calls = tuple(ToolCall(str(n), "add", json.dumps({"a": n})) for n in range(20))
    messages = await episode.call_tools(Message("assistant", "so", calls))
    assert [(m.tool_call_id, m.content) for m in messages] == [
        (str(n), str(n + 1)) for n in range(20)
    ]


async def test_an_error_that_is_no_value_error_is_the_authors(episode):
    action = Message("assistant", tool_calls=(ToolCall("1", "divide", '{"by": 0}'),))
    with pytest.raises(ZeroDivisionError):
        await episode.call_tools(action)


def untyped(a):
    pass


def spread(*a: int):
    pass


def positional(a: int, /):
    pass


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (untyped, "has no type"),
        (spread, "cannot be given by name"),
        (positional, "cannot be given by name"),
        (lambda a: a, "no name of a tool"),
    ],
)
def test_a_function_that_can_be_no_tool_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        tool_of(function)
