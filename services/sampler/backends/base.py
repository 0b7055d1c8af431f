"""What the core asks of an inference engine; vLLM's and transformers' fulfil it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from rollmesh.types import StopReason

MAX_TEMPERATURE = 2.0
"""vLLM refuses more."""


@dataclass(frozen=True, slots=True)
class Model:
    """The base model as the engine has it."""

    vocab_size: int
    max_length: int


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter version as the engine knows it.

    `number` and `name` are never used for anything else, not even for the same version loaded
    again: no cache of the engine's can mistake one for another. `folder` is in PEFT's format and
    stays until the version is unloaded, since vLLM reads it again after evicting it from memory.
    """

    number: int
    name: str
    folder: Path


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw, every default filled in and every value in range.

    `max_tokens` fits into the context. `temperature` 0 is greedy. `top_k` 0 is no limit. `seed` is
    in [0, 2**62).
    """

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of completion `index`, and why it ended if it did.

    The token that ends it (end of sequence, stop token, last of a stop string) is among them.
    `logprobs`: of each token under the policy itself, before temperature and truncation.
    """

    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    stop_reason: StopReason | None


class Backend(Protocol):
    """An inference engine. Methods but start and stop raise Unavailable once it is dead."""

    @property
    def name(self) -> str:
        """As GetSampler tells it."""
        ...

    async def start(self) -> Model:
        """Load the base model; return once the engine answers."""
        ...

    async def stop(self) -> None:
        """End the engine and every process and thread of it, even in the middle of its start."""
        ...

    async def failure(self) -> str:
        """Wait until the engine is dead; return what is known about why."""
        ...

    async def load(self, adapter: LoadedAdapter) -> None:
        """Make an adapter ready to be used.

        Raises:
            FailedPrecondition: the engine cannot use it.
        """
        ...

    async def unload(self, adapter: LoadedAdapter) -> None:
        """Free an adapter, which no request uses."""
        ...

    def sample(
        self,
        adapter: LoadedAdapter | None,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        draw: Draw,
    ) -> AsyncGenerator[Delta, None]:
        """Draw completions; None: from the base model. Closing the iterator ends the work."""
        ...

    async def compute_logprobs(
        self, adapter: LoadedAdapter | None, token_ids: Sequence[int]
    ) -> list[float]:
        """Log-probability of each token given those before it; the first is NaN."""
        ...
