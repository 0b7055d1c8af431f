"""What the parts of the reward service ask of each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rollmesh import chat


class LocalEnvironment(Protocol):
    """An environment inside the reward service: single turns, and all tasks known."""

    info: chat.EnvironmentInfo

    def page(self, split: str, start: int, count: int) -> list[chat.Task]:
        """The tasks [start, start + count) of a split, or what there is of them. Blocks.

        Raises:
            InvalidRequest: there is no such split.
        """
        ...

    def task(self, task_id: str) -> chat.Task:
        """One task. Blocks.

        Raises:
            NotFound: there is no such task.
        """
        ...

    async def score(self, items: Sequence[chat.Answered]) -> list[chat.Scored]:
        """What the answers are worth, in order."""
        ...
