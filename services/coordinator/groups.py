"""Finished groups to bytes and back: what the store keeps until their step is recorded.

A line of JSON, then arrays, little-endian and one after the other: int32 prompt tokens; of each
completion int32 tokens and float32 log-probabilities; where there is a teacher, of each completion
its float32 log-probabilities. So what a sampler answered comes back bit for bit, and the batch that
a step was trained on is the same batch when it is made again. Log-probabilities of prompts, which
no job asks for, are left out.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from rollmesh import types
from services.coordinator.datasets import Task
from services.coordinator.rollouts import Drawn, Group

if TYPE_CHECKING:
    from collections.abc import Sequence


def group_to_bytes(group: Group) -> bytes:
    """What `group_from_bytes` makes the same group of."""
    drawn = group.drawn
    header = {
        "number": group.number,
        "attempt": group.attempt,
        "policy_version": group.policy_version,
        "task": [drawn.task.id, drawn.task.fields],
        "rewards": list(group.rewards),
        "sample_s": group.sample_s,
        "reward_s": group.reward_s,
        "num_prompt_tokens": len(drawn.prompt_token_ids),
        "has_teacher": group.teacher_logprobs is not None,
        "completions": [_described(completion) for completion in drawn.completions],
    }
    parts = [json.dumps(header).encode(), b"\n", _bytes(drawn.prompt_token_ids, "<i4")]
    for completion in drawn.completions:
        parts += [_bytes(completion.token_ids, "<i4"), _bytes(completion.logprobs, "<f4")]
    parts += [_bytes(logprobs, "<f4") for logprobs in group.teacher_logprobs or ()]
    return b"".join(parts)


def group_from_bytes(body: bytes) -> Group:
    """The group that `group_to_bytes` made `body` of."""
    line, _, arrays = body.partition(b"\n")
    header = json.loads(line)
    taken = 0

    def take(count: int, dtype: str) -> list[Any]:
        nonlocal taken
        array = np.frombuffer(arrays, dtype, count, offset=taken)
        taken += array.nbytes
        values: list[Any] = array.tolist()
        return values

    prompt = take(header["num_prompt_tokens"], "<i4")
    completions = [
        types.Completion(
            token_ids=tuple(take(described["num_tokens"], "<i4")),
            logprobs=tuple(take(described["num_tokens"], "<f4")),
            spans=tuple(types.PolicySpan(*span) for span in described["spans"]),
            stop_reason=described["stop_reason"],
        )
        for described in header["completions"]
    ]
    teacher = None
    if header["has_teacher"]:
        teacher = [take(len(completion.token_ids), "<f4") for completion in completions]
    task_id, fields = header["task"]
    return Group(
        number=header["number"],
        policy_version=header["policy_version"],
        drawn=Drawn(Task(task_id, fields), prompt, completions),
        rewards=header["rewards"],
        sample_s=header["sample_s"],
        reward_s=header["reward_s"],
        attempt=header["attempt"],
        teacher_logprobs=teacher,
    )


def _described(completion: types.Completion) -> dict[str, Any]:
    return {
        "num_tokens": len(completion.token_ids),
        "stop_reason": completion.stop_reason,
        "spans": [
            (span.num_tokens, span.policy_version, span.digest, span.sampler)
            for span in completion.spans
        ],
    }


def _bytes(values: Sequence[float], dtype: str) -> bytes:
    return np.asarray(values, dtype).tobytes()
