"""The program of an agent that is nothing but a chat, in this process: what `verifiers` runs.

It says the prompt, calls the tools that the model asks for, and ends with a reply that asks for
none. `verifiers` loads it by the name that it is registered under, as any installed harness.
"""

from __future__ import annotations

import json
import sys
from contextlib import AsyncExitStack
from typing import Any

import httpx
from verifiers import v1 as vf
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

__all__ = ["ChatHarness", "ChatHarnessConfig"]

ID = "rollmesh-chat"
_MAX_ERROR = 500


class ChatHarnessConfig(vf.HarnessConfig):  # type: ignore[misc] # it has no types here
    """Nothing of its own."""


class ChatHarness(vf.Harness[ChatHarnessConfig]):  # type: ignore[misc]
    """A chat in this process."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: Any,
        trace: Any,  # noqa: ARG002 - as verifiers calls it
        runtime: Any,  # noqa: ARG002
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: Any,
    ) -> Any:
        """Chat until the model calls no more tools."""
        system, prompt = self.resolve_prompt(data)
        messages = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or []]
        servers = {
            name: {"url": url, "timeout": self.config.tool_timeout}
            for name, url in mcp_urls.items()
        }
        async with AsyncExitStack() as stack:
            tools, dispatch, connections = await connect_mcp({"mcpServers": servers}, stack)
            # Of this machine, over HTTP: a TLS context would cost more than all the rest. A model
            # takes as long as it takes.
            http = await stack.enter_async_context(httpx.AsyncClient(verify=False, timeout=None))  # noqa: S113, S501
            while True:
                body = {"model": ctx.model, "messages": messages} | (
                    {"tools": tools} if tools else {}
                )
                answer = await http.post(
                    f"{endpoint}/chat/completions",
                    json=body,
                    headers={"Authorization": f"Bearer {secret}"},
                )
                answer.raise_for_status()
                message = answer.json()["choices"][0]["message"]
                messages.append(message)
                if not message.get("tool_calls"):
                    return vf.ProgramResult(exit_code=0, stdout="", stderr="")
                for call in message["tool_calls"]:
                    function = call["function"]
                    content = await _called(
                        connections, dispatch, function["name"], function["arguments"]
                    )
                    messages.append(
                        {"role": "tool", "tool_call_id": call["id"], "content": content}
                    )


async def _called(connections: Any, dispatch: Any, name: str, arguments_json: str) -> Any:
    """What a tool says, or what was wrong with its call."""
    if name not in dispatch:
        return f"error: no tool {name[:64]!r}, there is {', '.join(dispatch) or 'none'}"
    try:
        arguments = json.loads(arguments_json or "{}")
    except (ValueError, RecursionError):
        return "error: the arguments are no JSON"
    if not isinstance(arguments, dict):
        return "error: the arguments are no JSON object"
    try:
        return await call_mcp(connections, dispatch, name, arguments)
    except Exception as error:  # noqa: BLE001 - whatever a tool makes of it is told to the model
        return f"error: {str(error)[:_MAX_ERROR]}"


sys.modules[ID.replace("-", "_")] = sys.modules[__name__]
