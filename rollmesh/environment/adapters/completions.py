"""OpenAI's chat completions on this machine, where whoever began a session is the model."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any, Self, cast

from aiohttp import web

from rollmesh import chat

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from types import TracebackType

    Model = Callable[[dict[str, Any]], Awaitable[chat.Message]]

SESSION = "X-Session-ID"
"""Header that says whose call it is."""
MAX_BODY_BYTES = 64 * 1024 * 1024


class Completions:
    """The server; an async context manager. `url`: what a client takes for its base."""

    def __init__(self) -> None:
        self.url = ""
        self._models: dict[str, Model] = {}
        application = web.Application(client_max_size=MAX_BODY_BYTES)
        application.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._runner.cleanup()

    @contextlib.contextmanager
    def session(self, name: str, model: Model) -> Iterator[None]:
        """As long as the block lasts `model` answers the calls of this session."""
        self._models[name] = model
        try:
            yield
        finally:
            del self._models[name]

    async def _complete(self, request: web.Request) -> web.Response:
        model = self._models.get(request.headers.get(SESSION, ""))
        if model is None:
            return web.json_response({"error": {"message": "the session is over"}}, status=400)
        body = await request.json()
        try:
            answer = await model(body)
        except asyncio.CancelledError:
            return web.json_response({"error": {"message": "no answer comes"}}, status=400)
        return web.json_response(completion_of(answer, str(body.get("model"))))


def completion_of(answer: chat.Message, model: str) -> dict[str, Any]:
    """An assistant's message as the response of a chat completion."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments_json},
            }
            for call in answer.tool_calls
        ]
    reason = "tool_calls" if answer.tool_calls else "stop"
    return {
        "id": "chatcmpl-rollmesh",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


def message_of(wire: dict[str, Any]) -> chat.Message:
    """A message of a request as ours.

    Raises:
        ValueError: it has more than text.
    """
    content = wire.get("content") or ""
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise ValueError("a message has more than text")
        content = "\n".join(part["text"] for part in content)
    calls = tuple(
        chat.ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in wire.get("tool_calls") or ()
    )
    role = "system" if wire["role"] == "developer" else wire["role"]
    return chat.Message(cast("chat.Role", role), content, calls, wire.get("tool_call_id") or "")


def tools_of(body: dict[str, Any]) -> tuple[chat.Tool, ...]:
    """The tools that a request offers."""
    functions = [tool["function"] for tool in body.get("tools") or () if "function" in tool]
    return tuple(
        chat.Tool(
            function["name"],
            function.get("description") or "",
            json.dumps(function.get("parameters") or {}),
        )
        for function in functions
    )
