"""What the core of the reward service needs of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rollmesh import chat


class LocalEnvironment(Protocol):
    """An environment inside the reward service: single turns alone."""

    info: chat.EnvironmentInfo

    def page(self, split: str, start: int, count: int) -> list[chat.Task]:
        """At most `count` tasks of `split` from number `start` on; it may block."""
        ...

    def task(self, task_id: str) -> chat.Task:
        """One task; raises NotFound."""
        ...

    async def score(self, items: Sequence[chat.Answered]) -> list[chat.Scored]:
        """What the answers are worth, in order."""
        ...
