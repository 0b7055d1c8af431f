"""Typed functions as tools: their JSON Schema for the model, and its calls run."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import re
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import to_json

from rollmesh import chat
from rollmesh.environment.episode import Episode

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from pydantic.json_schema import JsonSchemaValue

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_ERRORS = 3
"""Wrong arguments that a model is told of at once."""


class _Untitled(GenerateJsonSchema):
    """Titles only repeat the names, and a model would read them all."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False

    def model_schema(self, schema: Any) -> JsonSchemaValue:
        made = super().model_schema(schema)
        made.pop("title", None)
        return made


@dataclass(frozen=True, slots=True)
class Function:
    """A tool, and what runs it."""

    run: Callable[..., Any]
    arguments: type[BaseModel]
    takes_episode: str
    """Name of the parameter that takes the episode; empty: there is none."""
    tool: chat.Tool


def tool_of(function: Callable[..., Any]) -> Function:
    """`function` as a tool: its name, docstring and typed parameters, but for one of Episode.

    Raises:
        ValueError: a parameter has no type or is not to be given by name, or the name is none.
    """
    name = function.__name__
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a tool: it is to fit {_NAME.pattern}")
    types = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    takes_episode = ""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}:
            raise ValueError(f"{name}: parameter {parameter.name!r} cannot be given by name")
        if parameter.name not in types:
            raise ValueError(f"{name}: parameter {parameter.name!r} has no type")
        if types[parameter.name] is Episode:
            takes_episode = parameter.name
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (types[parameter.name], default)
    arguments = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    schema = json.dumps(arguments.model_json_schema(schema_generator=_Untitled))
    description = inspect.getdoc(function) or ""
    return Function(function, arguments, takes_episode, chat.Tool(name, description, schema))


class Toolbox:
    """Runs calls of tools, those that are plain functions in `threads`."""

    def __init__(self, functions: dict[str, Function], threads: Executor) -> None:
        self._functions = functions
        self._threads = threads

    async def answer(self, call: chat.ToolCall, episode: Episode) -> chat.Message:
        """What the model is told that made `call`."""
        return chat.Message("tool", await self._run(call, episode), tool_call_id=call.id)

    async def _run(self, call: chat.ToolCall, episode: Episode) -> str:
        function = self._functions.get(call.name)
        if function is None:
            return f"error: no tool {call.name[:64]!r}, there is {', '.join(self._functions)}"
        try:
            parsed = function.arguments.model_validate_json(call.arguments_json or "{}")
        except ValidationError as error:
            return f"error: {_told(error)}"
        arguments = {name: getattr(parsed, name) for name in function.arguments.model_fields}
        if function.takes_episode:
            arguments[function.takes_episode] = episode
        try:
            result = await run(functools.partial(function.run, **arguments), self._threads)
        except ValueError as error:
            return f"error: {error}"
        return result if isinstance(result, str) else to_json(result, fallback=str).decode()


async def run(function: functools.partial[Any], threads: Executor) -> Any:
    """What an author's function gives: awaited on the loop, or called in `threads`."""
    if inspect.iscoroutinefunction(function.func):
        return await function()
    return await asyncio.get_running_loop().run_in_executor(threads, function)


def _told(error: ValidationError) -> str:
    errors = error.errors(include_url=False, include_input=False)
    told = [
        ": ".join(filter(None, (".".join(map(str, each["loc"])), each["msg"])))
        for each in errors[:_MAX_ERRORS]
    ]
    return "; ".join(told)
