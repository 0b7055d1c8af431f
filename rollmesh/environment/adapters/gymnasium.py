"""A Gymnasium environment whose actions can be said in words, and whose state can be shown as text.

A task is a seed of the environment's own, so that all episodes of a task begin alike.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import gymnasium

from rollmesh import chat
from rollmesh.environment.adapters import name_of
from rollmesh.environment.author import Environment
from rollmesh.environment.tasks import Generated
from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rollmesh.environment.episode import Episode

MAX_CONCURRENT_EPISODES = 256
"""Each has an environment of its own, which may hold megabytes."""
NUM_HELDOUT = 256

ACTIONS = {
    "FrozenLake": ("left", "down", "right", "up"),
    "FrozenLake8x8": ("left", "down", "right", "up"),
    "CliffWalking": ("up", "right", "down", "left"),
    "Taxi": ("south", "north", "east", "west", "pickup", "dropoff"),
    "Blackjack": ("stick", "hit"),
}
"""Names of actions, from the environments' documentation, which has them nowhere for programs."""

_COLORED = re.compile(r"\x1b\[([0-9;]*)m([^\x1b]*)\x1b\[0m")
_BLUE = "34"


def adapt(name: str, *, num_tasks: int, max_turns: int) -> Environment:
    """The environment that Gymnasium knows by the id `name`.

    Raises:
        InvalidRequest: it knows none, or the actions are not a set of choices.
    """
    try:
        first: Any = gymnasium.make(name)
    except gymnasium.error.Error as error:
        raise InvalidRequest(f"spec: gymnasium:{name}: {error}", field="spec") from None
    space = first.action_space
    mode = "ansi" if "ansi" in first.metadata.get("render_modes", []) else None
    first.close()
    if not isinstance(space, gymnasium.spaces.Discrete):
        raise InvalidRequest(
            f"spec: gymnasium:{name} takes {space} for an action, and only Discrete can be said",
            field="spec",
        )
    actions = _actions(first.spec.name, space)

    environment = Environment(
        name_of(name),
        version=f"{name} of gymnasium {gymnasium.__version__}",
        description=f"{name} of Gymnasium. An action is one of {', '.join(actions)}. Of what is "
        "shown, what is highlighted stands in [ ], what is blue in ( ), other colors in { }.",
        tasks={
            "train": Generated(num_tasks, _task),
            "heldout": Generated(NUM_HELDOUT, lambda n: _task(num_tasks + n)),
        },
        deterministic=True,
        max_concurrent_episodes=MAX_CONCURRENT_EPISODES,
    )

    @environment.episode(max_turns=max_turns)
    async def play(episode: Episode) -> chat.Response:
        made = await _in_thread(gymnasium.make, name, render_mode=mode)
        try:
            return await _play(episode, made, actions)
        finally:
            await _in_thread(made.close)

    return environment


async def _play(episode: Episode, made: Any, actions: dict[str, int]) -> chat.Response:
    seed = int(episode.task.fields["seed"])
    shown, info = await _in_thread(made.reset, seed=seed)
    told = f"{await _in_thread(_shown, made, shown)}\n{', '.join(actions)}?"
    reward = 0.0
    while True:
        action = await episode.ask(told, reward=reward)
        chosen = actions.get(action.content.strip().lower())
        if chosen is None:
            told, reward = f"no such action\n{', '.join(actions)}?", 0.0
            continue
        shown, given, done, truncated, info = await _in_thread(made.step, chosen)
        told, reward = await _in_thread(_shown, made, shown), float(given)
        if done or truncated:
            return chat.Response(
                (chat.Message("user", told),),
                reward,
                truncated=bool(truncated and not done),
                info={key: str(value) for key, value in info.items()},
            )


async def _in_thread(function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:
    """What `function` gives; who is cancelled waits for it, as no two calls may overlap."""
    call = asyncio.ensure_future(asyncio.to_thread(function, *arguments, **named))
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        await asyncio.wait([call])
        raise


def _task(seed: int) -> chat.Task:
    return chat.Task("", fields={"seed": str(seed)})


def _actions(family: str, space: Any) -> dict[str, int]:
    """What can be said, and the action that it is."""
    names: Sequence[str] = ACTIONS.get(family, ())
    if len(names) != space.n:
        names = [str(number) for number in range(int(space.n))]
    return {name: int(space.start) + place for place, name in enumerate(names)}


def _shown(made: Any, observation: Any) -> str:
    """The environment as it shows itself, else the observation, without colors."""
    text = made.render() if made.render_mode == "ansi" else str(observation)
    count = 1
    while count:  # Colors may stand in colors.
        text, count = _COLORED.subn(_plain, text)
    return text.strip("\n").rstrip()


def _plain(match: re.Match[str]) -> str:
    codes = match[1].split(";")
    if any(code.startswith("4") for code in codes):
        return f"[{match[2]}]"
    return f"({match[2]})" if _BLUE in codes else f"{{{match[2]}}}"
