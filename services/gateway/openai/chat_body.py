"""The body of POST /v1/chat/completions, and its messages as chat templates take them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator
from pydantic_core import from_json

from rollmesh.errors import InvalidRequest
from services.gateway.openai.bodies import INT32, AnyObject, Closed, Drawing

_NAME = r"^[A-Za-z0-9_.-]{1,64}$"


def _text(value: object) -> object:
    """Content may come in parts; of those only text can be told to these models."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") not in {"text", "refusal"}:
            raise ValueError("only parts of type 'text' are supported")
        text = part.get(part["type"])
        if not isinstance(text, str):
            raise ValueError("a part of type 'text' has its text in 'text'")  # noqa: TRY004 - pydantic's way
        texts.append(text)
    return "".join(texts)


def _arguments(value: object) -> object:
    """Templates want them as what the JSON says."""
    if not isinstance(value, str):
        raise ValueError("arguments are JSON as text")  # noqa: TRY004 - pydantic's way
    try:
        return from_json(value or "{}", allow_inf_nan=False)
    except ValueError:
        raise ValueError(f"not JSON: {value[:100]!r}") from None


class CalledFunction(Closed):
    """The function of a call. `arguments`: as JSON in text, here what it says."""

    name: str = Field(min_length=1)
    arguments: Annotated[Any, PlainValidator(_arguments)] = Field(default_factory=dict)


class Call(Closed):
    """A tool that an assistant called."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # Left over where a client put a stream together.


class ChatMessage(Closed):
    """One message. What an answer's message has beside its text comes back with it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_text)] = ""
    name: str | None = None
    tool_calls: list[Call] = []
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None

    @model_validator(mode="after")
    def _calls_are_an_assistants(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: a message of role {self.role!r} has none")
        return self

    def for_template(self) -> dict[str, Any]:
        """As templates take it: those know no developer, and arguments as objects."""
        return {
            "role": "system" if self.role == "developer" else self.role,
            **self.model_dump(
                include={"content", "name", "tool_call_id", "reasoning_content"}, exclude_none=True
            ),
            **(
                {"tool_calls": [call.model_dump(exclude={"index"}) for call in self.tool_calls]}
                if self.tool_calls
                else {}
            ),
        }


class Function(Closed):
    """What a tool is. No parameters: it takes no arguments."""

    name: str = Field(pattern=_NAME)
    description: str = ""
    parameters: AnyObject = {}
    strict: bool = False


class Tool(Closed):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As templates take it."""
        return self.model_dump(exclude={"function": {"strict"}})


def _choice(value: object) -> str:
    """none, auto, required, or `=` and the name of a function."""
    if value in {"none", "auto", "required"} if isinstance(value, str) else False:
        return str(value)
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise ValueError("none, auto, required, or an object that names a function")  # noqa: TRY004 - pydantic's way
    return f"={name}"


class ChatBody(Drawing):
    """A request of chat completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[Tool] = []
    tool_choice: Annotated[str, PlainValidator(_choice)] = "auto"
    parallel_tool_calls: bool = True
    max_completion_tokens: int | None = Field(None, ge=1, lt=INT32)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise _contradiction("top_logprobs", self.top_logprobs, "0 without logprobs")
        if self.tool_choice not in {"none", "auto"} and not self.required:
            allowed = "none or auto" if not self.tools else "a function of tools"
            raise _contradiction("tool_choice", self.tool_choice.removeprefix("="), allowed)
        return self

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def required(self) -> list[Function]:
        """Of which one has to be called; none: the model decides."""
        if self.tool_choice == "required":
            return [tool.function for tool in self.tools]
        name = self.tool_choice.removeprefix("=")
        if name == self.tool_choice:
            return []
        return [tool.function for tool in self.tools if tool.function.name == name]


def _contradiction(field: str, value: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field}: {value!r}, allowed is {allowed}", field=field, value=value, allowed=allowed
    )
