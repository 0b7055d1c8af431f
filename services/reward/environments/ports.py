"""What routing needs of the network: connections to replicas, and where a name leads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from rollmesh import chat

    Requests = AsyncIterator[chat.Start | chat.Message]
    Tell = Callable[[chat.Response], Awaitable[None]]


class EpisodePort(Protocol):
    """`rollmesh.client.Episode`."""

    first: chat.Response

    async def act(self, action: chat.Message) -> chat.Response:
        """What comes of it."""
        ...

    async def give_up(self) -> chat.Response | None:
        """What it was worth, where the environment says that."""
        ...

    async def end(self) -> None:
        """Until the environment has ended the stream."""
        ...

    def on_end(self, listener: Callable[[], None]) -> None:
        """Call `listener` when the stream is over."""
        ...


class EnvironmentPort(Protocol):
    """`rollmesh.client.EnvironmentClient`."""

    async def describe(self) -> list[chat.EnvironmentInfo]:
        """The environments of the server."""
        ...

    async def list_tasks(
        self, environment: str, split: str, *, page_size: int = 0, page_token: str = ""
    ) -> tuple[list[chat.Task], str]:
        """Tasks of a split, and the token of the next page."""
        ...

    async def get_task(self, environment: str, task_id: str) -> chat.Task:
        """One task."""
        ...

    async def score(self, environment: str, items: Sequence[chat.Answered]) -> list[chat.Scored]:
        """What answers are worth."""
        ...

    def episode(
        self, environment: str, task_id: str, *, seed: int = 0
    ) -> AbstractAsyncContextManager[EpisodePort]:
        """An episode, over when the block is left."""
        ...


class HealthPort(Protocol):
    """`rollmesh.client.HealthProbe`."""

    num_answers: int

    async def check(self) -> bool:
        """Whether the server takes work; raises Unimplemented or NotFound where it does not say."""
        ...


@dataclass(frozen=True, slots=True)
class Connection:
    """How to talk to one replica. `health` goes another way, which calls cannot block."""

    environment: EnvironmentPort
    health: HealthPort
    close: Callable[[], Awaitable[None]]


class Connect(Protocol):
    """Makes connections to replicas of one environment."""

    def __call__(self, place: str, authority: str) -> Connection:
        """To `place` (IP:port), which the configuration calls `authority` (host:port)."""
        ...


class Resolve(Protocol):
    """Looks names up."""

    async def __call__(self, address: str) -> list[str]:
        """Every IP:port behind `address` (host:port), sorted; raises Unavailable."""
        ...
