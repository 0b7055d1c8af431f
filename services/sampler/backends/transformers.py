"""transformers' own models with PEFT adapters: for machines that vLLM has no wheel for.

Simple and slow: requests take turns token by token in one compute thread, and only the completions
of one request are computed together. Draws the same distribution as vLLM from the same seed, but
not the same tokens: the random streams are others.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from rollmesh.errors import FailedPrecondition, Unimplemented
from services.sampler.backends.transformers_engine import Engine

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from rollmesh.types import Continuation
    from services.sampler.backends.base import Delta, Draw, LoadedAdapter, Model
    from services.sampler.config import SamplerConfig

_Result = TypeVar("_Result")


class TransformersBackend:
    """A Backend. Keys and values are never reused, so nobody's reach anybody else."""

    name = "transformers"

    def __init__(self, config: SamplerConfig) -> None:
        self._config = config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._engine = Engine()

    async def start(self) -> Model:
        """Load model and tokenizer."""
        return await self._compute(self._engine.start, self._config)

    async def stop(self) -> None:
        """End the compute thread, after the step that it is at."""
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    async def failure(self) -> str:
        """Never: what fails here fails in a request, and is told to its caller."""
        await asyncio.Event().wait()
        return ""

    def silent_s(self) -> float:
        """Always 0: the engine lives in this process, and whoever can ask finds it alive.

        A thread that hangs cannot be told from one that is at a long prompt.
        """
        return 0.0

    async def load(self, adapter: LoadedAdapter) -> None:
        """Put an adapter on the model, and compare what is there with its file and digest."""
        try:
            await self._compute(self._engine.load, adapter)
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise FailedPrecondition(
                f"PEFT cannot use {adapter.name}: {error}", resource=adapter.name
            ) from error

    async def unload(self, adapter: LoadedAdapter) -> None:
        """Take an adapter off the model."""
        await self._compute(self._engine.unload, adapter)

    async def sample(
        self,
        adapter: LoadedAdapter | None,
        prompt_token_ids: Sequence[int],
        completions: Sequence[Continuation],
        draw: Draw,
        *,
        project: str,  # noqa: ARG002 - nothing is kept from one request to the next
    ) -> AsyncGenerator[Delta, None]:
        """Draw completions, one token of each at a time. No step is taken that nobody waits for."""
        _refuse_constraints(draw)
        prompt = list(prompt_token_ids)
        prompt_logprobs = None
        if draw.prompt_logprobs is not None:
            prompt_logprobs = await self._compute(
                self._engine.prompt_logprobs, adapter, prompt, draw.prompt_logprobs
            )
        groups = [
            await self._compute(self._engine.begin, adapter, prompt, alike, draw)
            for alike in _by_length(completions)
        ]
        while groups:
            for group in groups:
                for delta in await self._compute(self._engine.step, group):
                    yield replace(delta, prompt_logprobs=prompt_logprobs)
                    prompt_logprobs = None
            groups = [group for group in groups if group.running]

    async def compute_logprobs(
        self,
        adapter: LoadedAdapter | None,
        token_ids: Sequence[int],
        *,
        project: str,  # noqa: ARG002 - as in sample
    ) -> list[float]:
        """Log-probability of each token given those before it."""
        found = await self._compute(self._engine.prompt_logprobs, adapter, list(token_ids), 0)
        return list(found.logprobs)

    async def _compute(self, work: Callable[..., _Result], *args: object) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)


def _refuse_constraints(draw: Draw) -> None:
    for field in ("json_schema", "regex"):
        if getattr(draw, field) is not None:
            raise Unimplemented(
                f"params.{field}: the transformers backend cannot constrain what it draws",
                field=f"params.{field}",
            )


def _by_length(completions: Sequence[Continuation]) -> list[list[Continuation]]:
    """Those of the same length together: rows of one batch need no padding then."""
    groups: dict[int, list[Continuation]] = {}
    for begun in completions:
        groups.setdefault(len(begun.token_ids), []).append(begun)
    return list(groups.values())
