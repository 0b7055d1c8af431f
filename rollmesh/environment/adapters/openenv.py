"""An OpenEnv server: a WebSocket session for each episode.

An action is what the model says: a JSON object of the action's schema, or the bare value where the
schema has one required field. A task is a seed, which the server may heed.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING, Any

import httpx
from openenv.core.generic_client import GenericEnvClient

from rollmesh import chat
from rollmesh.environment.adapters import name_of
from rollmesh.environment.author import Environment
from rollmesh.environment.tasks import Generated
from rollmesh.errors import InvalidRequest, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rollmesh.environment.episode import Episode

MAX_CONCURRENT_EPISODES = 256
"""A server has a limit of its own, which it does not tell; the one beyond it ends UNAVAILABLE."""
NUM_HELDOUT = 256
_ASK_S = 10.0
_FENCED = re.compile(r"```[a-z]*\n(.*)\n```", re.DOTALL)


def adapt(name: str, *, num_tasks: int, max_turns: int) -> Environment:
    """The environment of the server at the URL `name`.

    Raises:
        InvalidRequest: it is no URL.
        Unavailable: nothing that is an OpenEnv server answers there.
    """
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", name):
        raise InvalidRequest(f"spec: openenv:{name[:200]} is no http(s)://…", field="spec")
    url = name.rstrip("/")
    metadata, schema = _told(url)

    environment = Environment(
        name_of(metadata.get("name") or "openenv"),
        version=str(metadata.get("version") or "unknown"),
        description=str(metadata.get("description") or f"the OpenEnv server at {url}"),
        tasks={
            "train": Generated(num_tasks, _task),
            "heldout": Generated(NUM_HELDOUT, lambda n: _task(num_tasks + n)),
        },
        max_concurrent_episodes=MAX_CONCURRENT_EPISODES,
    )

    @environment.episode(max_turns=max_turns)
    async def play(episode: Episode) -> chat.Response:
        async with _session(url) as client:
            result = await client.reset(seed=int(episode.task.fields["seed"]))
            while not result.done:
                action = await episode.ask(
                    _shown(result.observation), reward=float(result.reward or 0.0)
                )
                try:
                    parsed = _action(action.content, schema)
                    result = await client.step(parsed)
                except _Wrong as wrong:
                    result = type(result)({"error": str(wrong)}, 0.0, done=False)
            return chat.Response(
                (chat.Message("user", _shown(result.observation)),), float(result.reward or 0.0)
            )

    return environment


class _Wrong(Exception):
    """An action that is none; the text is for the model."""


class _Client(GenericEnvClient):  # type: ignore[misc] # it has no types here
    """Tells an action that the server refuses from a server that fails."""

    async def _send_and_receive(self, message: dict[str, Any]) -> dict[str, Any]:
        await self._send(message)
        response: dict[str, Any] = await self._receive()
        if response.get("type") == "error":
            data = response.get("data", {})
            text = str(data.get("message", "unknown"))[:500]
            if message["type"] == "step" and data.get("code") == "VALIDATION_ERROR":
                raise _Wrong(text)
            raise RuntimeError(f"the OpenEnv server said {data.get('code')}: {text}")
        return response


@contextlib.asynccontextmanager
async def _session(url: str) -> AsyncIterator[Any]:
    client = _Client(base_url=url)
    try:
        await client.connect()
    except ConnectionError as error:
        raise Unavailable(str(error)) from None
    try:
        yield client
    finally:
        await client.close()


def _told(url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The server's metadata, and the JSON Schema of its actions."""
    try:
        with httpx.Client(base_url=url, timeout=_ASK_S) as http:
            metadata = http.get("/metadata").raise_for_status().json()
            schema = http.get("/schema").raise_for_status().json()["action"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise Unavailable(f"no OpenEnv server answers at {url}: {error}") from None
    return metadata, schema


def _task(seed: int) -> chat.Task:
    return chat.Task("", fields={"seed": str(seed)})


def _action(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    """What the model says as an action."""
    fenced = _FENCED.fullmatch(text.strip())
    text = fenced[1].strip() if fenced else text.strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if isinstance(value, dict):
        return value
    required = schema.get("required", [])
    if len(required) != 1:
        raise _Wrong(f"an action is a JSON object with {', '.join(required) or 'no fields'}")
    field = required[0]
    is_text = schema.get("properties", {}).get(field, {}).get("type") == "string"
    return {field: text if is_text else value}


def _shown(observation: dict[str, Any]) -> str:
    """An observation as text: of one field that is text, that; else all as JSON."""
    told = {key: value for key, value in observation.items() if key != "metadata"}
    if len(told) == 1:
        (value,) = told.values()
        if isinstance(value, str):
            return value
    return json.dumps(told, ensure_ascii=False, default=str)
