"""Environments: chats, tasks, episodes, and what judges are asked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, get_args

from rollmesh import chat, types
from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.api.reward.v1 import reward_service_pb2 as reward_pb
from rollmesh.convert.fleet import score_items_from_pb
from rollmesh.convert.values import (
    duration_to_pb,
    optional,
    optional_duration_from_pb,
    struct_from_pb,
)
from rollmesh.errors import EnvironmentFailed, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

_ROLES = get_args(chat.Role)
_KINDS: Mapping[chat.ObservationKind, pb.ObservationKind.ValueType] = {
    "text": pb.OBSERVATION_KIND_TEXT,
    "tool": pb.OBSERVATION_KIND_TOOL,
}


def message_to_pb(message: chat.Message) -> pb.Message:
    """Message."""
    return pb.Message(
        role=message.role,
        content=message.content,
        tool_calls=[
            pb.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json)
            for call in message.tool_calls
        ],
        tool_call_id=message.tool_call_id,
    )


def message_from_pb(message: pb.Message, *, field: str = "message") -> chat.Message:
    """Message.

    Raises:
        InvalidRequest: the role is none of the four.
    """
    role = next((known for known in _ROLES if known == message.role), None)
    if role is None:
        allowed = ", ".join(_ROLES)
        raise InvalidRequest(
            f"{field}.role: {message.role[:100]!r} is not one of {allowed}",
            field=f"{field}.role",
            value=message.role[:100],
            allowed=allowed,
        )
    return chat.Message(
        role,
        message.content,
        tuple(
            chat.ToolCall(call.id, call.name, call.arguments_json) for call in message.tool_calls
        ),
        message.tool_call_id,
    )


def messages_from_pb(
    messages: Iterable[pb.Message], *, field: str = "messages"
) -> tuple[chat.Message, ...]:
    """Messages of a chat; errors as of message_from_pb."""
    return tuple(
        message_from_pb(message, field=f"{field}[{index}]")
        for index, message in enumerate(messages)
    )


def environment_to_pb(info: chat.EnvironmentInfo) -> pb.Environment:
    """Environment."""
    limits = pb.Limits(
        max_concurrent_episodes=info.limits.max_concurrent_episodes,
        max_score_batch=info.limits.max_score_batch,
        max_turns=info.limits.max_turns,
    )
    if info.limits.max_answer_s is not None:
        limits.max_answer_time.CopyFrom(duration_to_pb(info.limits.max_answer_s))
    return pb.Environment(
        name=info.name,
        version=info.version,
        description=info.description,
        has_score=info.has_score,
        has_episodes=info.has_episodes,
        tools=[
            pb.Tool(
                name=tool.name,
                description=tool.description,
                parameters_schema_json=tool.parameters_schema_json,
            )
            for tool in info.tools
        ],
        observation_kinds=[_KINDS[kind] for kind in info.observation_kinds],
        deterministic=info.deterministic,
        limits=limits,
        splits=[pb.Split(name=split.name, num_tasks=split.num_tasks) for split in info.splits],
    )


def environment_from_pb(message: pb.Environment) -> chat.EnvironmentInfo:
    """Environment. Kinds of observations that are not known here are left out."""
    return chat.EnvironmentInfo(
        name=message.name,
        version=message.version,
        description=message.description,
        has_score=message.has_score,
        has_episodes=message.has_episodes,
        tools=tuple(
            chat.Tool(tool.name, tool.description, tool.parameters_schema_json)
            for tool in message.tools
        ),
        observation_kinds=tuple(
            kind for kind, value in _KINDS.items() if value in message.observation_kinds
        ),
        deterministic=message.deterministic,
        limits=chat.Limits(
            max_concurrent_episodes=message.limits.max_concurrent_episodes,
            max_score_batch=message.limits.max_score_batch,
            max_turns=message.limits.max_turns,
            max_answer_s=optional_duration_from_pb(message.limits, "max_answer_time"),
        ),
        splits=tuple(chat.Split(split.name, split.num_tasks) for split in message.splits),
    )


def task_to_pb(task: chat.Task) -> pb.Task:
    """Task."""
    return pb.Task(
        id=task.id,
        split=task.split,
        messages=map(message_to_pb, task.messages),
        fields=dict(task.fields),
    )


def task_from_pb(message: pb.Task, *, field: str = "task") -> chat.Task:
    """Task; errors as of message_from_pb."""
    return chat.Task(
        id=message.id,
        split=message.split,
        messages=messages_from_pb(message.messages, field=f"{field}.messages"),
        fields=dict(message.fields),
    )


def answered_to_pb(answered: chat.Answered) -> pb.ScoreItem:
    """ScoreItem."""
    return pb.ScoreItem(
        task=task_to_pb(answered.task), messages=map(message_to_pb, answered.messages)
    )


def answered_from_pb(message: pb.ScoreItem, *, field: str) -> chat.Answered:
    """ScoreItem.

    Raises:
        InvalidRequest: a role; or the last message is not the assistant's.
    """
    messages = messages_from_pb(message.messages, field=f"{field}.messages")
    if not messages or messages[-1].role != "assistant":
        found = messages[-1].role if messages else "nothing"
        raise InvalidRequest(
            f"{field}.messages: the last is to be the assistant's, it is {found}",
            field=f"{field}.messages",
            value=found,
            allowed="assistant",
        )
    return chat.Answered(task_from_pb(message.task, field=f"{field}.task"), messages)


def scored_to_pb(scored: chat.Scored) -> pb.Scored:
    """Scored."""
    return pb.Scored(
        reward=scored.reward,
        rewards=dict(scored.rewards),
        feedback=scored.feedback,
        failure=scored.failure,
    )


def scored_from_pb(message: pb.Scored) -> chat.Scored:
    """Scored; one without a finite reward is the environment's failure."""
    if not message.failure and not _finite(message.reward, message.rewards):
        return chat.Scored(failure="a reward that is not finite")
    return chat.Scored(message.reward, dict(message.rewards), message.feedback, message.failure)


def episode_request_from_pb(message: pb.EpisodeRequest) -> chat.Start | chat.Message:
    """EpisodeRequest: what begins an episode, or an action.

    Raises:
        InvalidRequest: it is neither, or as of message_from_pb.
    """
    match message.WhichOneof("request"):
        case "start":
            start = message.start
            return chat.Start(start.environment, start.task_id, start.seed)
        case "action":
            return message_from_pb(message.action, field="action")
        case _:
            raise InvalidRequest(
                "request: neither start nor action is set",
                field="request",
                allowed="start or action",
            )


def response_to_pb(response: chat.Response) -> pb.EpisodeResponse:
    """EpisodeResponse."""
    return pb.EpisodeResponse(
        observation=map(message_to_pb, response.observation),
        reward=response.reward,
        rewards=dict(response.rewards),
        done=response.done,
        truncated=response.truncated,
        info=dict(response.info),
    )


def response_from_pb(message: pb.EpisodeResponse) -> chat.Response:
    """EpisodeResponse.

    Raises:
        EnvironmentFailed: a reward that is not finite, or a role that does not exist.
    """
    if not _finite(message.reward, message.rewards):
        raise EnvironmentFailed("the environment gave a reward that is not finite")
    try:
        observation = messages_from_pb(message.observation, field="observation")
    except InvalidRequest as error:
        raise EnvironmentFailed(str(error)) from None
    return chat.Response(
        observation=observation,
        reward=message.reward,
        rewards=dict(message.rewards),
        done=message.done,
        truncated=message.truncated,
        info=dict(message.info),
    )


def _finite(reward: float, rewards: Mapping[str, float]) -> bool:
    return all(map(math.isfinite, [reward, *rewards.values()]))


def environment_status_to_pb(status: chat.EnvironmentStatus) -> reward_pb.EnvironmentStatus:
    """EnvironmentStatus."""
    return reward_pb.EnvironmentStatus(
        name=status.name,
        serving=status.serving,
        problem=status.problem,
        num_replicas=status.num_replicas,
        num_serving=status.num_serving,
        num_running=status.num_running,
        num_waiting=status.num_waiting,
    )


def environment_status_from_pb(message: reward_pb.EnvironmentStatus) -> chat.EnvironmentStatus:
    """EnvironmentStatus."""
    return chat.EnvironmentStatus(
        name=message.name,
        serving=message.serving,
        problem=message.problem,
        num_replicas=message.num_replicas,
        num_serving=message.num_serving,
        num_running=message.num_running,
        num_waiting=message.num_waiting,
    )


def question_to_pb(question: chat.Question) -> reward_pb.Question:
    """Question."""
    return reward_pb.Question(
        number=question.number,
        messages=map(message_to_pb, question.messages),
        adapter=question.adapter,
        policy_version=question.policy_version,
        base_model=question.base_model,
        max_tokens=question.max_tokens,
        temperature=question.temperature,
    )


def question_from_pb(message: reward_pb.Question) -> chat.Question:
    """Question; errors as of message_from_pb."""
    return chat.Question(
        number=message.number,
        messages=messages_from_pb(message.messages),
        adapter=message.adapter,
        policy_version=optional(message, "policy_version"),
        base_model=message.base_model,
        max_tokens=message.max_tokens,
        temperature=message.temperature,
    )


def item_score_to_pb(score: chat.ItemScore) -> reward_pb.ItemScore:
    """ItemScore."""
    return reward_pb.ItemScore(
        index=score.index,
        reward=score.reward,
        rewards=dict(score.rewards),
        feedback=score.feedback,
    )


def item_score_from_pb(message: reward_pb.ItemScore) -> chat.ItemScore:
    """ItemScore."""
    return chat.ItemScore(message.index, message.reward, dict(message.rewards), message.feedback)


async def score_each_requests_from_pb(
    messages: AsyncIterator[reward_pb.ScoreEachRequest],
) -> AsyncIterator[types.ScoreBatch | chat.Answer]:
    """ScoreEachRequests, as they come.

    Raises:
        InvalidRequest: one that says nothing; NaN or infinity among the parameters.
    """
    async for message in messages:
        match message.WhichOneof("request"):
            case "batch":
                yield types.ScoreBatch(
                    message.batch.function,
                    struct_from_pb(message.batch.parameters),
                    score_items_from_pb(message.batch.items),
                )
            case "answer":
                yield chat.Answer(message.answer.question, message.answer.text)
            case _:
                raise InvalidRequest(
                    "request: neither batch nor answer", field="request", allowed="batch, answer"
                )


def score_each_response_to_pb(
    response: chat.ItemScore | chat.Question,
) -> reward_pb.ScoreEachResponse:
    """ScoreEachResponse."""
    if isinstance(response, chat.Question):
        return reward_pb.ScoreEachResponse(question=question_to_pb(response))
    return reward_pb.ScoreEachResponse(score=item_score_to_pb(response))
