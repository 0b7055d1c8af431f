"""A person plays an environment in the place of the model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from rollmesh import chat
from rollmesh.cli.output import one_line
from rollmesh.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rollmesh.client import EnvironmentClient

CALL = "/call"
"""What a line begins with that calls a tool: `/call NAME {"argument": …}`."""


async def play(client: EnvironmentClient, environment: str, task_id: str, seed: int) -> None:
    """Play one episode, or answer one single turn, over standard input and output.

    Raises:
        NotFound: there is no such environment or task.
        InvalidRequest: there are several environments, and none is named.
    """
    info = _chosen(await client.describe(), environment)
    if task_id:
        task = await client.get_task(info.name, task_id)
    else:
        listed, _ = await client.list_tasks(info.name, info.splits[0].name, page_size=1)
        task = listed[0]
    typer.echo(f"task {task.id}, seed {seed}")
    if info.tools:
        names = ", ".join(tool.name for tool in info.tools)
        typer.echo(f'tools: {names}; call one with {CALL} NAME {{"argument": "value"}}')
    if info.has_episodes:
        await _play_episode(client, info, task, seed)
    else:
        await _answer(client, info, task)


async def _play_episode(
    client: EnvironmentClient, info: chat.EnvironmentInfo, task: chat.Task, seed: int
) -> None:
    async with client.episode(info.name, task.id, seed=seed) as episode:
        response: chat.Response | None = episode.first
        total = 0.0
        while response is not None:
            total += response.reward
            _show(response)
            if response.done:
                break
            action = _read()
            response = await (episode.give_up() if action is None else episode.act(action))
            if action is None and response is not None:
                total += response.reward
                _show(response)
                break
        typer.echo(f"the episode is worth {total:g}")


async def _answer(client: EnvironmentClient, info: chat.EnvironmentInfo, task: chat.Task) -> None:
    _say(task.messages)
    action = _read()
    if action is None:
        return
    (scored,) = await client.score(info.name, [chat.Answered(task, [*task.messages, action])])
    if scored.failure:
        typer.echo(f"it could not be scored: {one_line(scored.failure)}")
        return
    typer.echo(f"the answer is worth {scored.reward:g}{_parts(scored.rewards)}")
    if scored.feedback:
        typer.echo(one_line(scored.feedback))


def _chosen(infos: list[chat.EnvironmentInfo], name: str) -> chat.EnvironmentInfo:
    names = ", ".join(info.name for info in infos)
    if not name and len(infos) != 1:
        raise InvalidRequest(
            f"--environment: which one? There are {names or 'none'}", field="--environment"
        )
    for info in infos:
        if name in {"", info.name}:
            return info
    raise NotFound(f"there is no environment {name!r}, there is {names}")


def _read() -> chat.Message | None:
    """What the person says; None: no more."""
    typer.echo("> ", nl=False)
    line = sys.stdin.readline()
    if not line:
        typer.echo()
        return None
    text = line.removesuffix("\n")
    if not text.startswith(CALL):
        return chat.Message("assistant", text)
    name, _, arguments = text.removeprefix(CALL).strip().partition(" ")
    call = chat.ToolCall("call_0", name, arguments.strip() or "{}")
    return chat.Message("assistant", tool_calls=(call,))


def _show(response: chat.Response) -> None:
    _say(response.observation)
    notes = [f"reward {response.reward:g}{_parts(response.rewards)}"] if response.reward else []
    notes += [f"{name}: {one_line(value)}" for name, value in response.info.items()]
    if response.done:
        notes.append("cut off" if response.truncated else "done")
    if notes:
        typer.echo(f"  ({', '.join(notes)})")


def _say(messages: Iterable[chat.Message]) -> None:
    for message in messages:
        for line in message.content.splitlines() or [""]:
            typer.echo(f"{message.role}: {_printable(line)}")


def _printable(text: str) -> str:
    """`text` without what steers a terminal; a board keeps its columns."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _parts(rewards: Mapping[str, float]) -> str:
    told = ", ".join(f"{name} {value:g}" for name, value in rewards.items())
    return f" ({told})" if told else ""
