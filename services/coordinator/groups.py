"""What jobs are trained on: turns make a rollout, the rollouts of one task a group.

All that a turn's prompt and completion hold is kept verbatim: what a policy drew is what it is
trained on, and nothing is ever tokenized again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rollmesh.types import Completion, PolicySpan
    from services.coordinator.datasets import Task


@dataclass(frozen=True, slots=True)
class Turn:
    """A completion, and the tokens that the policy read since its last one, of which it has one."""

    prompt_token_ids: Sequence[int]
    completion: Completion


@dataclass(frozen=True, slots=True)
class Rollout:
    """One episode. Its reward is 0 where the job has none.

    `rewards`: what it is made up of, by name. `truncated`: it was cut off, by max_tokens, the
    context or a limit of its environment, before it came to its own end.
    """

    turns: Sequence[Turn]
    reward: float = 0.0
    rewards: Mapping[str, float] = field(default_factory=dict)
    truncated: bool = False

    @property
    def token_ids(self) -> list[int]:
        """All T tokens, read and drawn, in order."""
        return [
            token
            for turn in self.turns
            for token in chain(turn.prompt_token_ids, turn.completion.token_ids)
        ]

    @property
    def num_drawn(self) -> int:
        """Tokens that the policy drew."""
        return sum(len(turn.completion.token_ids) for turn in self.turns)

    @property
    def logprobs(self) -> list[float]:
        """Of the tokens that were drawn, in order."""
        return [logprob for turn in self.turns for logprob in turn.completion.logprobs]

    @property
    def spans(self) -> list[PolicySpan]:
        """They tile the tokens that were drawn, in order."""
        return [span for turn in self.turns for span in turn.completion.spans]

    def is_drawn(self) -> np.ndarray:
        """Bool [T]: which tokens the policy drew."""
        return np.concatenate(
            [
                np.repeat(
                    [False, True], [len(turn.prompt_token_ids), len(turn.completion.token_ids)]
                )
                for turn in self.turns
            ]
        )


@dataclass(frozen=True, slots=True)
class Group:
    """What one training step needs of one task.

    `policy_version`: the oldest that drew a token of it. `attempt`: how many groups of the same
    number this one replaces. `teacher_logprobs`: by rollout, of each token that it drew; None:
    there is no teacher.
    """

    number: int
    policy_version: int
    task: Task
    rollouts: Sequence[Rollout]
    sample_s: float
    reward_s: float
    attempt: int = 0
    teacher_logprobs: Sequence[Sequence[float]] | None = None

    @property
    def rewards(self) -> list[float]:
        """By rollout."""
        return [rollout.reward for rollout in self.rollouts]

    def samplers(self) -> set[str]:
        """Who drew a token of it, by instance_id."""
        return {span.sampler for rollout in self.rollouts for span in rollout.spans}


def oldest_version(rollouts: Sequence[Rollout]) -> int:
    """The oldest policy_version that drew a token of them."""
    return min(span.policy_version for rollout in rollouts for span in rollout.spans)


def at_drawn(rollout: Rollout, values: Sequence[float] | np.ndarray | float) -> np.ndarray:
    """float32 [T]: `values` at the tokens that were drawn, one for each or one for all; else 0."""
    array: np.ndarray[Any, np.dtype[np.float32]] = np.zeros(len(rollout.token_ids), np.float32)
    array[rollout.is_drawn()] = values
    return array
