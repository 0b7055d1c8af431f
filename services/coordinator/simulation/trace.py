"""What happened in a simulation, as the modelled machines saw it: the figures are made of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from services.coordinator.scheduler import Request

Phase = Literal["sample", "reward", "queue", "train", "load"]


@dataclass(frozen=True, slots=True)
class Begun:
    """A request got a place on a sampler."""

    time: float
    request: Request
    address: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """A request got tokens; `num_finished` of its completions ended; all of it did, or it left."""

    time: float
    request: Request
    num_tokens: int
    num_finished: int
    left: bool


@dataclass(frozen=True, slots=True)
class Trained:
    """A step of a job on groups: their numbers and the versions that they were drawn from.

    `tokens`: of prompts and completions. `began`: when the trainer took it.
    """

    time: float
    job: str
    step: int
    groups: tuple[tuple[int, int], ...]
    tokens: int
    began: float


@dataclass(frozen=True, slots=True)
class Marked:
    """Something that has no more to it than its name, and the request that waits."""

    time: float
    what: Literal[
        "submitted",
        "started",
        "scored",
        "ended",
        "waiting",
        "restart",
        "sampler_down",
        "sampler_up",
    ]
    subject: str
    number: int = 0
    request: Request | None = None


@dataclass(slots=True)
class Trace:
    """`happened` in order; by job, when it was in which phase; by machine, how much it ran."""

    happened: list[Begun | Drawn | Trained | Marked] = field(default_factory=list)
    phases: dict[str, list[tuple[Phase, float, float]]] = field(default_factory=dict)
    # (time, completions under way from then on), (begin, end)
    samplers: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    trainers: list[list[tuple[float, float]]] = field(default_factory=list)
    steps: dict[str, list[float]] = field(default_factory=dict)
    end: float = 0.0
