"""What the core asks of an inference engine; vLLM's and transformers' fulfil it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from rollmesh.types import Continuation, LogprobsKind, PromptLogprobs, StopReason

MAX_TEMPERATURE = 2.0
"""vLLM refuses more."""


@dataclass(frozen=True, slots=True)
class Model:
    """The base model as the engine has it.

    `max_loras`: adapters that may be loaded at once. `kv_tokens`: tokens whose keys and values fit
    into the engine's memory; 0: no bound.
    """

    vocab_size: int
    max_length: int
    max_loras: int
    kv_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter version as the engine knows it.

    `number` and `name` are never used for other tensors, not even for the same version pulled
    again: no cache of the engine's can mistake one for another. `folder` is in PEFT's format; it
    stays while the version is here, loaded or not. `digest` is that of its tensors. `config`:
    contents of adapter_config.json as it was pulled (empty before), as no digest protects the file.
    """

    number: int
    name: str
    folder: Path
    digest: str
    config: str = ""

    @property
    def policy(self) -> str:
        """Which it is a version of."""
        return self.name.partition("/versions/")[0]


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw, every default filled in and every value in range.

    `max_tokens` fits into the context; tokens that a continuation has already are among them.
    `temperature` 0 is greedy. `top_k` 0 is no limit. `seed` is in [0, 2**62): the draw of a token
    depends on it, on the completion's index and on the token's place in the completion, alone.
    """

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    json_schema: str | None = None
    regex: str | None = None
    logprobs_kind: LogprobsKind = "policy"
    prompt_logprobs: int | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of completion `index`, and why it ended if it did.

    The token that ends it (end of sequence, stop token, last of a stop string) is among them.
    `logprobs`: of each token, of the draw's kind. `prompt_logprobs`: with one of a request's
    deltas, where the draw asks for them. `top_token_ids`, `top_logprobs`: where it asks for them, a
    row for each token, the likeliest first; -1 and -inf where fewer can be drawn.
    """

    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    stop_reason: StopReason | None
    prompt_logprobs: PromptLogprobs | None = None
    top_token_ids: Sequence[Sequence[int]] = ()
    top_logprobs: Sequence[Sequence[float]] = ()

    def part(self, places: slice, stop_reason: StopReason | None) -> Delta:
        """Some of its tokens, with all that belongs to them."""
        return replace(
            self,
            token_ids=self.token_ids[places],
            logprobs=self.logprobs[places],
            stop_reason=stop_reason,
            top_token_ids=self.top_token_ids[places],
            top_logprobs=self.top_logprobs[places],
        )


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

    def silent_s(self) -> float:
        """Seconds since the engine's last sign of life, which comes several times a second."""
        ...

    async def load(self, adapter: LoadedAdapter) -> None:
        """Put an adapter into a slot, of which one is free; return once it was read back.

        Slots of adapters whose unloading was begun before are free: an engine that is busy with a
        step is waited for once, not once for each.

        Raises:
            FailedPrecondition: the engine cannot use it.
            DigestMismatch: what the engine loaded is not what the folder, or its digest, says.
        """
        ...

    async def unload(self, adapter: LoadedAdapter) -> None:
        """Free the slot of an adapter, which no request uses. It may be loaded again."""
        ...

    def sample(
        self,
        adapter: LoadedAdapter | None,
        prompt_token_ids: Sequence[int],
        completions: Sequence[Continuation],
        draw: Draw,
        *,
        project: str,
    ) -> AsyncGenerator[Delta, None]:
        """Draw completions; None: from the base model. Closing the iterator ends the work.

        Keys and values are reused only among requests of one project and one adapter.

        Raises:
            Unimplemented: the engine does not have what the draw asks for.
            InvalidRequest: the engine refuses its json_schema or regex.
        """
        ...

    async def compute_logprobs(
        self, adapter: LoadedAdapter | None, token_ids: Sequence[int], *, project: str
    ) -> list[float]:
        """Log-probability of each token given those before it; the first is NaN."""
        ...
