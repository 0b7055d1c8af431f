"""What a reward function is.

A function scores one item and knows nothing of batches, processes or the wire. A completion is
what a model wrote, so nothing in it is an error; `reference` and the parameters are the caller's.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

from rollmesh.chat import Scored
from rollmesh.config import Config

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from rollmesh.chat import Question
    from rollmesh.types import ScoreItem
    from services.reward.sandbox import Sandbox

P = TypeVar("P", bound=Config)
P_contra = TypeVar("P_contra", bound=Config, contravariant=True)

Worth: TypeAlias = "float | Scored"
"""What a function says of an item: its reward, or that with what it is made up of and why."""


class NoParameters(Config):
    """For a function that takes none."""


class Means(Protocol):
    """What a function that is a coroutine has beside its item."""

    @property
    def sandbox(self) -> Sandbox:
        """Where what a model wrote is run. Raises FailedPrecondition where there is none."""
        ...

    async def ask(self, question: Question) -> str:
        """What a judge answers; the question's number is given to it here."""
        ...

    async def score_part(self, index: int, item: ScoreItem) -> Scored:
        """What the part with that index, of the function's own `parts`, says of `item`."""
        ...


class Asynchronous(Protocol[P_contra]):
    """A function that waits: for a judge, for the sandbox, for its parts."""

    __name__: str

    def __call__(self, item: ScoreItem, parameters: P_contra, means: Means) -> Awaitable[Worth]:
        """The item's worth."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """A function that another one is made up of: its name and its parameters, unchecked.

    `reference`: what it compares with instead of the item's. None: the item's.
    """

    function: str
    parameters: Mapping[str, Any]
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class RewardFunction(Generic[P]):
    """A reward function; its name is that of `score`, its description `score`'s docstring.

    Attributes:
        score: the worth of one item, finite. Raises InvalidRequest with `field` "reference" or
            "parameters.NAME" for what the caller got wrong. A coroutine is given Means too.
        parameters: the closed model of its parameters.
        isolated: whether its time may explode on some input. It then runs in a process of its own,
            where time and memory are bounded. Not for a coroutine.
        reward_when_stuck: reward of a completion on which an isolated function exceeds its bounds.
            None: the batch is refused.
        prepare: of an isolated function, what its process does before, and which is not the item's
            time: a slow import. It is called each time.
        asks_judge: whether it uses Means.ask.
        needs_sandbox: whether it uses Means.sandbox.
        parts: the functions that it is made up of, in its parameters.
    """

    score: Callable[[ScoreItem, P], Worth] | Asynchronous[P]
    parameters: type[P]
    isolated: bool = False
    reward_when_stuck: float | None = None
    prepare: Callable[[], object] | None = None
    asks_judge: bool = False
    needs_sandbox: bool = False
    parts: Callable[[P], Sequence[Part]] | None = None

    @property
    def name(self) -> str:
        """What callers call it."""
        return self.score.__name__

    @property
    def is_asynchronous(self) -> bool:
        """Whether `score` is a coroutine."""
        return inspect.iscoroutinefunction(self.score)

    @property
    def description(self) -> str:
        """What it rewards, in plain text."""
        return " ".join(inspect.cleandoc(self.score.__doc__ or "").split())


def scored(worth: Worth) -> Scored:
    """A function's answer in its long form."""
    return worth if isinstance(worth, Scored) else Scored(reward=worth)
