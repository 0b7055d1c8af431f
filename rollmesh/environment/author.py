"""What an author says of an environment: its tasks, and the functions that score or play them."""

from __future__ import annotations

import contextlib
import inspect
import re
import typing
from typing import TYPE_CHECKING, TypeVar

from rollmesh import chat
from rollmesh.environment.episode import Episode, Reward
from rollmesh.environment.tasks import Tasks
from rollmesh.environment.tools import Function, tool_of
from rollmesh.names import ID_PATTERN

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

Score = typing.Callable[..., "float | chat.Scored | Awaitable[float | chat.Scored]"]
"""Of a task and its answer: text, or the whole message where the parameter is a Message."""
Play = typing.Callable[[Episode], "Awaitable[Reward | None]"]

Resources = typing.Callable[[], "AbstractAsyncContextManager[object]"]

AnyFunction = TypeVar("AnyFunction", bound="Callable[..., object]")
ScoreFunction = TypeVar("ScoreFunction", bound=Score)
PlayFunction = TypeVar("PlayFunction", bound=Play)
ResourcesFunction = TypeVar("ResourcesFunction", bound=Resources)


class Environment:
    """An environment written in Python; its decorators take the functions that it is made of.

    Args:
        name: 1–63 of a-z, 0-9 and '-', starting with a letter.
        version: changes whenever the same actions may be rewarded differently.
        description: what it is about, in a sentence or two.
        tasks: by split, e.g. "train" and "heldout": what the user says, or tasks, or `Generated`.
        tools: those of the model that the episode's own code runs; see `tool` for others.
        deterministic: whether the same task, seed and actions always give the same.
        max_concurrent_episodes: one more is refused. Each takes about 30 KB, beside what the code
            that plays it keeps.
        max_score_batch: answers in one request; more are refused.
        max_answer_s: seconds that one answer takes at most when all is well; None: not known.

    Raises:
        ValueError: one of these is wrong.
    """

    def __init__(
        self,
        name: str,
        *,
        version: str,
        tasks: Mapping[str, Sequence[str | chat.Task]],
        description: str = "",
        tools: Sequence[chat.Tool] = (),
        deterministic: bool = False,
        max_concurrent_episodes: int = 20_000,
        max_score_batch: int = 4_096,
        max_answer_s: float | None = None,
    ) -> None:
        if not re.fullmatch(ID_PATTERN, name):
            raise ValueError(f"{name!r} is no name of an environment: it is to fit {ID_PATTERN}")
        if not version:
            raise ValueError("an environment has a version")
        if max_concurrent_episodes < 1 or max_score_batch < 1:
            raise ValueError("max_concurrent_episodes and max_score_batch are at least 1")
        self.name = name
        self.tasks = Tasks(tasks)
        self.tools: dict[str, Function] = {}
        self.resources: Resources = contextlib.nullcontext
        self._own_tools = tuple(tools)
        self.score_function: Score | None = None
        self.play_function: Play | None = None
        self._version = version
        self._description = description
        self._deterministic = deterministic
        self._max_concurrent_episodes = max_concurrent_episodes
        self._max_score_batch = max_score_batch
        self._max_turns = 0
        self._max_answer_s = max_answer_s

    def score(self, function: ScoreFunction) -> ScoreFunction:
        """`function(task, answer)` says what one answer is worth.

        A plain function runs in a thread, a coroutine on the event loop, many at once. The answer
        is text, or a Message where the parameter is annotated so. An error that it raises fails its
        item alone.
        """
        self.score_function = function
        return function

    def episode(self, *, max_turns: int) -> Callable[[PlayFunction], PlayFunction]:
        """`function(episode)` plays one episode, of at most `max_turns` actions; a coroutine.

        It returns what the last action was worth. When the client goes away it is cancelled.
        """
        if max_turns < 1:
            raise ValueError("max_turns is at least 1")

        def take(function: PlayFunction) -> PlayFunction:
            is_coroutine = inspect.iscoroutinefunction(function)
            if not is_coroutine:
                raise ValueError(f"{function.__name__} is to be a coroutine: async def")
            self.play_function = function
            self._max_turns = max_turns
            return function

        return take

    def tool(self, function: AnyFunction) -> AnyFunction:
        """`function` becomes a tool of the model, which `Episode.call_tools` runs.

        Its docstring and the types of its parameters are what the model is told; a parameter of
        type Episode gets the episode. A ValueError that it raises is told to the model.
        """
        made = tool_of(function)
        self.tools[made.tool.name] = made
        return function

    def lifespan(self, function: ResourcesFunction) -> ResourcesFunction:
        """`function()` is an async context manager: what all episodes share, while it is served."""
        self.resources = function
        return function

    @property
    def wants_message(self) -> bool:
        """Whether the scoring function takes the answer as a Message."""
        assert self.score_function is not None  # noqa: S101 - asked only where there is one
        _, answer = inspect.signature(self.score_function).parameters.values()
        hints = typing.get_type_hints(self.score_function)
        return hints.get(answer.name) is chat.Message

    @property
    def info(self) -> chat.EnvironmentInfo:
        """As Describe tells it."""
        return chat.EnvironmentInfo(
            name=self.name,
            version=self._version,
            splits=self.tasks.splits,
            description=self._description,
            has_score=self.score_function is not None,
            has_episodes=self.play_function is not None,
            tools=(*self._own_tools, *(function.tool for function in self.tools.values())),
            observation_kinds=("text", "tool") if self._own_tools or self.tools else ("text",),
            deterministic=self._deterministic,
            limits=chat.Limits(
                self._max_concurrent_episodes if self.play_function else 0,
                self._max_score_batch if self.score_function else 0,
                self._max_turns,
                self._max_answer_s,
            ),
        )
