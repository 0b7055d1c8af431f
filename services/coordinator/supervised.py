"""Supervised fine-tuning: groups whose one completion is given by the task, not sampled.

They go the way of sampled groups, so that a job learns, pauses and is recovered as any other.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.errors import InvalidRequest
from services.coordinator.groups import Group, Rollout, Turn
from services.coordinator.prompts import completion_token_ids, prompt_token_ids

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rollmesh.job import JobSpec
    from services.coordinator.datasets import Task
    from services.coordinator.ports import Tokenizer


MAX_CHECKED = 2048


class Supervised:
    """A ports.GroupMaker. `source` and `attempt` change nothing but what the group says of them."""

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer) -> None:
        self._spec = spec
        self._tokenizer = tokenizer

    async def group(
        self, number: int, source: types.AdapterSource, task: Task, attempt: int = 0
    ) -> Group:
        """The prompt of `task` and the completion to learn.

        Raises:
            InvalidRequest: the task makes no prompt or no completion.
        """
        prompt = prompt_token_ids(self._spec.prompt, task, self._tokenizer)
        tokens = tuple(completion_token_ids(self._spec, task, self._tokenizer))
        # No policy drew them: no spans, and log-probabilities that nobody reads.
        given = types.Completion(tokens, (0.0,) * len(tokens), (), "stop")
        return Group(
            number=number,
            policy_version=source.policy_version,
            task=task,
            rollouts=[Rollout([Turn(prompt, given)])],
            sample_s=0.0,
            reward_s=0.0,
            attempt=attempt,
        )


def _num_characters(task: Task) -> int:
    return sum(map(len, task.fields.values()))


def check_lengths(
    spec: JobSpec, tasks: Iterable[Task], tokenizer: Tokenizer, *, max_length: int | None
) -> None:
    """Refuse a task whose prompt and completion a trainer cannot read. May take a second.

    Of many tasks those with the longest texts are looked at: to tokenize all takes too long.
    `max_length`: of a trainer's sequence, of which the last token is only predicted; None: unknown.

    Raises:
        InvalidRequest: as Supervised.group; or too long, with the task.
    """
    for task in heapq.nlargest(MAX_CHECKED, tasks, key=_num_characters):
        num_prompt = len(prompt_token_ids(spec.prompt, task, tokenizer))
        num_completion = len(completion_token_ids(spec, task, tokenizer))
        if max_length is not None and num_prompt + num_completion - 1 > max_length:
            raise InvalidRequest(
                f"sft.completion: task {task.id!r} has {num_prompt} tokens of prompt and "
                f"{num_completion} of completion; the trainers of {spec.base_model!r} take "
                f"{max_length + 1} together",
                field="sft.completion",
                value=num_prompt + num_completion,
                allowed=max_length + 1,
            )
