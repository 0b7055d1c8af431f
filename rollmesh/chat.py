"""Chats, tasks, and what environments make of them, as plain immutable Python.

`rollmesh.convert.environments` maps them to and from protobuf. Their meaning, units and defaults
are those of the messages of the same name in protos/rollmesh/api/environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Role = Literal["system", "user", "assistant", "tool"]
ObservationKind = Literal["text", "tool"]

MAX_TASK_ID = 255
"""Characters of a task's id."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """An assistant calls a tool. `arguments_json`: as the model wrote it, right or wrong."""

    id: str
    name: str
    arguments_json: str = "{}"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat. `tool_call_id`: of a tool, the call that it answers."""

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that the model may call. No schema: it takes no arguments."""

    name: str
    description: str = ""
    parameters_schema_json: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much an environment takes. 0, or None for seconds: no limit."""

    max_concurrent_episodes: int = 0
    max_score_batch: int = 0
    max_turns: int = 0
    max_answer_s: float | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """A set of tasks. `num_tasks` 0: not known."""

    name: str
    num_tasks: int = 0


@dataclass(frozen=True, slots=True)
class EnvironmentInfo:
    """An environment as Describe tells it."""

    name: str
    version: str
    splits: tuple[Split, ...]
    description: str = ""
    has_score: bool = False
    has_episodes: bool = False
    tools: tuple[Tool, ...] = ()
    observation_kinds: tuple[ObservationKind, ...] = ("text",)
    deterministic: bool = False
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class Task:
    """What one rollout is about. `messages`: of a single turn the chat to answer."""

    id: str
    split: str = ""
    messages: tuple[Message, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answered:
    """A task and the chat about it, whose last message answers it."""

    task: Task
    messages: Sequence[Message]


@dataclass(frozen=True, slots=True)
class Scored:
    """What one answer is worth. `failure`: why it could not be scored, then there is no reward."""

    reward: float = 0.0
    rewards: Mapping[str, float] = field(default_factory=dict)
    feedback: str = ""
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Start:
    """What begins an episode. `seed`: of everything random in it, ≥ 0."""

    environment: str
    task_id: str
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Response:
    """What came of an action, or at first what there is to see. `reward`: of this action alone."""

    observation: tuple[Message, ...] = ()
    reward: float = 0.0
    rewards: Mapping[str, float] = field(default_factory=dict)
    done: bool = False
    truncated: bool = False
    info: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EnvironmentStatus:
    """How an environment is, as the reward service sees it."""

    name: str
    serving: bool
    problem: str = ""
    num_replicas: int = 1
    num_serving: int = 0
    num_running: int = 0
    num_waiting: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """What a reward function asks a judge. Neither adapter nor base model: the caller's own."""

    number: int
    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float = 0.0
    adapter: str = ""
    policy_version: int | None = None
    base_model: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a judge said. `question`: the number of what it was asked."""

    question: int
    text: str


@dataclass(frozen=True, slots=True)
class ItemScore:
    """What one item of a batch is worth. `index`: its place there."""

    index: int
    reward: float
    rewards: Mapping[str, float] = field(default_factory=dict)
    feedback: str = ""
