"""One episode as its author sees it: straight-line code that asks for the model's next action."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from rollmesh import chat
from rollmesh.errors import EnvironmentFailed, InvalidRequest

if TYPE_CHECKING:
    from rollmesh.environment.tools import Toolbox

Observation = str | chat.Message | Sequence[chat.Message]
"""What the model is told next; text is the user's."""
Reward = float | chat.Scored | chat.Response
"""What an episode comes to: the last action's reward, with its parts and feedback, or all of it."""


_NOTHING = chat.Response()


class NoMoreActions(Exception):
    """`Episode.ask` gets no answer any more: the client has none, or `max_turns` is reached.

    Whoever catches it may still return what the episode was worth.
    """


@dataclass(frozen=True, slots=True)
class Start:
    """What begins an episode. `seed`: of everything random in it."""

    environment: str
    task_id: str
    seed: int = 0


class Wire(Protocol):
    """The two directions of one episode's stream."""

    async def receive(self) -> Start | chat.Message | None:
        """What comes next; None: the client has no more.

        Raises:
            InvalidRequest: it is neither a start nor an assistant's message.
        """
        ...

    async def send(self, response: chat.Response) -> None:
        """Send one response."""
        ...


class Episode:
    """An episode under way.

    Attributes:
        task: what it is about.
        seed: as the client gave it.
        num_turns: actions so far.
        state: whatever the author likes to keep here, for tools to read and change.
    """

    __slots__ = (
        "_is_cut_off",
        "_max_turns",
        "_rng",
        "_toolbox",
        "_unsent",
        "_wire",
        "num_turns",
        "seed",
        "state",
        "task",
    )

    def __init__(
        self, task: chat.Task, seed: int, *, wire: Wire, max_turns: int, toolbox: Toolbox
    ) -> None:
        self.task = task
        self.seed = seed
        self.num_turns = 0
        self.state: Any = None
        self._wire = wire
        self._max_turns = max_turns
        self._toolbox = toolbox
        self._is_cut_off = False
        self._unsent = _NOTHING
        self._rng: random.Random | None = None

    @property
    def rng(self) -> random.Random:
        """Draws the same for the same task and seed."""
        if self._rng is None:  # It takes 2.5 KB, which many episodes never need.
            self._rng = random.Random(f"{self.seed}/{self.task.id}")  # noqa: S311 - for games
        return self._rng

    async def ask(
        self,
        observation: Observation,
        *,
        reward: float = 0.0,
        rewards: Mapping[str, float] | None = None,
        info: Mapping[str, str] | None = None,
    ) -> chat.Message:
        """Tell the model `observation`, and what its last action was worth; its next action.

        Raises:
            NoMoreActions: none comes.
        """
        response = chat.Response(
            _messages(observation), float(reward), dict(rewards or {}), info=dict(info or {})
        )
        _check(response)
        if not self._is_cut_off and self.num_turns < self._max_turns:
            await self._wire.send(response)
            action = await self._wire.receive()
            if isinstance(action, Start):
                raise InvalidRequest("start: the episode has begun already", field="start")
            if action is not None:
                self.num_turns += 1
                return action
            response = _NOTHING
        if not self._is_cut_off:
            # What the last action was worth goes with the last response.
            self._unsent = replace(response, observation=())
        self._is_cut_off = True
        raise NoMoreActions

    async def call_tools(self, action: chat.Message) -> list[chat.Message]:
        """What the tools say that `action` calls, one message for each call, in order.

        A tool that does not exist, arguments that do not fit and a ValueError that a tool raises
        are told to the model; any other error is a failure of the environment.
        """
        return [await self._toolbox.answer(call, self) for call in action.tool_calls]

    def last(self, reward: Reward | None) -> chat.Response:
        """The response that ends the episode; `reward` None: the author's code left it unsaid."""
        last = _response(reward)
        unsent = self._unsent
        response = replace(
            last,
            reward=unsent.reward + last.reward,
            rewards={**unsent.rewards, **last.rewards},
            info={**unsent.info, **last.info},
            done=True,
            truncated=last.truncated or self._is_cut_off,
        )
        _check(response)
        return response


def _messages(observation: Observation) -> tuple[chat.Message, ...]:
    if isinstance(observation, str):
        return (chat.Message("user", observation),)
    messages = (observation,) if isinstance(observation, chat.Message) else tuple(observation)
    if not messages or any(message.role == "assistant" for message in messages):
        raise ValueError("an observation is at least one message, none of them the assistant's")
    return messages


def _response(reward: Reward | None) -> chat.Response:
    match reward:
        case None:
            return _NOTHING
        case chat.Response():
            return reward
        case chat.Scored():
            if reward.failure:
                raise EnvironmentFailed(reward.failure)
            info = {"feedback": reward.feedback} if reward.feedback else {}
            return chat.Response(reward=reward.reward, rewards=reward.rewards, info=info)
        case _:
            return chat.Response(reward=float(reward))


def _check(response: chat.Response) -> None:
    for name, value in {"reward": response.reward, **response.rewards}.items():
        if not math.isfinite(value):
            raise EnvironmentFailed(f"{name}: {value} is not finite", field=name, value=value)
