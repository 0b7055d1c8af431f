"""Finished groups to bytes and back: what the store keeps until their step is recorded.

A line of JSON, then arrays, little-endian and one after the other: of each turn of each rollout the
int32 tokens of its prompt, and the int32 tokens and float32 log-probabilities of its completion;
where there is a teacher, of each rollout its float32 log-probabilities. So what a sampler answered
comes back bit for bit, and the batch that a step was trained on is the same batch when it is made
again. Log-probabilities of prompts, which no job asks for, are left out.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from rollmesh import types
from rollmesh.chat import Message, ToolCall
from services.coordinator.datasets import Task
from services.coordinator.groups import Group, Rollout, Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Take = Callable[[int, str], list[Any]]


_FORMAT = 2
"""Of the bytes; what another build has written is not read."""


def group_to_bytes(group: Group) -> bytes:
    """What `group_from_bytes` makes the same group of."""
    header = {
        "format": _FORMAT,
        "number": group.number,
        "attempt": group.attempt,
        "policy_version": group.policy_version,
        "task": _task(group.task),
        "sample_s": group.sample_s,
        "reward_s": group.reward_s,
        "has_teacher": group.teacher_logprobs is not None,
        "rollouts": [
            {
                "reward": rollout.reward,
                "rewards": dict(rollout.rewards),
                "truncated": rollout.truncated,
                "turns": [_turn(turn) for turn in rollout.turns],
            }
            for rollout in group.rollouts
        ],
    }
    parts = [json.dumps(header).encode(), b"\n"]
    for turn in (turn for rollout in group.rollouts for turn in rollout.turns):
        completion = turn.completion
        parts += [
            _bytes(turn.prompt_token_ids, "<i4"),
            _bytes(completion.token_ids, "<i4"),
            _bytes(completion.logprobs, "<f4"),
        ]
    parts += [_bytes(logprobs, "<f4") for logprobs in group.teacher_logprobs or ()]
    return b"".join(parts)


def group_from_bytes(body: bytes) -> Group | None:
    """The group that `group_to_bytes` made `body` of; None: a build with another format did."""
    line, _, arrays = body.partition(b"\n")
    header = json.loads(line)
    if header.get("format") != _FORMAT:
        return None
    taken = 0

    def take(count: int, dtype: str) -> list[Any]:
        nonlocal taken
        array = np.frombuffer(arrays, dtype, count, offset=taken)
        taken += array.nbytes
        values: list[Any] = array.tolist()
        return values

    rollouts = [
        Rollout(
            turns=[_turn_from(described, take) for described in rollout["turns"]],
            reward=rollout["reward"],
            rewards=rollout["rewards"],
            truncated=rollout["truncated"],
        )
        for rollout in header["rollouts"]
    ]
    teacher = None
    if header["has_teacher"]:
        teacher = [take(rollout.num_drawn, "<f4") for rollout in rollouts]
    return Group(
        number=header["number"],
        policy_version=header["policy_version"],
        task=_task_from(header["task"]),
        rollouts=rollouts,
        sample_s=header["sample_s"],
        reward_s=header["reward_s"],
        attempt=header["attempt"],
        teacher_logprobs=teacher,
    )


def _task(task: Task) -> dict[str, Any]:
    return {
        "id": task.id,
        "fields": task.fields,
        "split": task.split,
        "messages": [
            {
                "role": message.role,
                "content": message.content,
                "tool_calls": [
                    [call.id, call.name, call.arguments_json] for call in message.tool_calls
                ],
                "tool_call_id": message.tool_call_id,
            }
            for message in task.messages
        ],
    }


def _task_from(described: Mapping[str, Any]) -> Task:
    messages = tuple(
        Message(
            message["role"],
            message["content"],
            tuple(ToolCall(*call) for call in message["tool_calls"]),
            message["tool_call_id"],
        )
        for message in described["messages"]
    )
    return Task(described["id"], described["fields"], described["split"], messages)


def _turn(turn: Turn) -> dict[str, Any]:
    return {
        "num_prompt_tokens": len(turn.prompt_token_ids),
        "num_tokens": len(turn.completion.token_ids),
        "stop_reason": turn.completion.stop_reason,
        "spans": [
            (span.num_tokens, span.policy_version, span.digest, span.sampler)
            for span in turn.completion.spans
        ],
    }


def _turn_from(described: Mapping[str, Any], take: Take) -> Turn:
    prompt = take(described["num_prompt_tokens"], "<i4")
    return Turn(
        prompt,
        types.Completion(
            token_ids=tuple(take(described["num_tokens"], "<i4")),
            logprobs=tuple(take(described["num_tokens"], "<f4")),
            spans=tuple(types.PolicySpan(*span) for span in described["spans"]),
            stop_reason=described["stop_reason"],
        ),
    )


def _bytes(values: Sequence[float], dtype: str) -> bytes:
    return np.asarray(values, dtype).tobytes()
