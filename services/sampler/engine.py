"""The sampler's core: admits requests, keeps their policy live, streams what the engine draws.

Every token is attributed to the version that the request held from its first token to its last.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rollmesh.errors import Overloaded, Unavailable
from rollmesh.names import parse_adapter
from rollmesh.telemetry import record, span
from rollmesh.types import (
    BASE_VERSION,
    AdapterSource,
    CompletionChunk,
    LoadTimes,
    Logprobs,
    PolicySpan,
    SamplerInfo,
    SamplingParams,
)
from services.sampler import validation
from services.sampler.backends.base import Delta

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence

    from services.sampler.adapters import Adapters
    from services.sampler.backends.base import Backend, LoadedAdapter, Model


class Sampler:
    """One base model in an engine, with adapters hot-swapped by version."""

    def __init__(
        self,
        backend: Backend,
        adapters: Adapters,
        *,
        base_model: str,
        max_rank: int,
        max_queued: int,
        chunk_tokens: int,
        new_seed: Callable[[], int],
    ) -> None:
        self._backend = backend
        self._adapters = adapters
        self._base_model = base_model
        self._max_rank = max_rank
        self._max_queued = max_queued
        self._chunk_tokens = chunk_tokens
        self._new_seed = new_seed
        self._started: Model | None = None
        self._num_requests = 0
        self._num_running = 0

    async def start(self) -> None:
        """Return once the engine draws: what its first batch makes slow is paid for here."""
        self._started = await self._backend.start()
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        async for _ in self.sample(None, [0], 2, params):
            pass

    async def failure(self) -> str:
        """Wait until the engine is dead; return why."""
        return await self._backend.failure()

    async def get_sampler(self) -> SamplerInfo:
        """What this sampler serves and how busy it is."""
        return SamplerInfo(
            base_model=self._base_model,
            vocab_size=self._model.vocab_size,
            max_length=self._model.max_length,
            backend=self._backend.name,
            num_running=self._num_running,
            loaded=self._adapters.live(),
            max_rank=self._max_rank,
        )

    async def load_adapter(self, source: AdapterSource) -> LoadTimes:
        """Return once a version is live; errors as `Adapters.ensure`."""
        validation.check_source(source)
        assert self._model  # noqa: S101 - raises Unavailable until the engine is there
        return await self._adapters.ensure(source)

    async def unload_adapter(self, adapter: str, policy_version: int | None) -> None:
        """Return once a version (None: every version) is gone and no request uses it."""
        parse_adapter(adapter, field="adapter")
        await self._adapters.unload(adapter, policy_version)

    async def sample(
        self,
        source: AdapterSource | None,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        params: SamplingParams,
    ) -> AsyncGenerator[CompletionChunk, None]:
        """The chunks of all completions, each completion's in order. Closing it aborts the work.

        Raises:
            InvalidRequest: the context names the field.
            Overloaded: as many requests as may be are here.
            Unavailable: the engine is starting, dead or going away.
        """
        validation.check_prompt(prompt_token_ids, self._model, field="prompt_token_ids")
        draw = validation.resolve(
            params, num_completions, len(prompt_token_ids), self._model, self._new_seed
        )
        # Greedy completions are all the same one: it is drawn once.
        num_drawn = num_completions if draw.temperature else 1
        with span("sampler.sample", num_completions=num_completions):
            async with (
                self._policy(source, num_completions) as adapter,
                contextlib.aclosing(
                    self._backend.sample(adapter, prompt_token_ids, num_drawn, draw)
                ) as deltas,
                contextlib.aclosing(_gathered(deltas, self._chunk_tokens)) as pieces,
            ):
                async for piece in pieces:
                    for index in [piece.index] if draw.temperature else range(num_completions):
                        record("rollmesh.sampler.tokens", len(piece.token_ids))
                        yield _chunk(index, piece, source)

    async def compute_logprobs(
        self, source: AdapterSource | None, token_ids: Sequence[int]
    ) -> Logprobs:
        """Log-probability of each token given those before it; errors as `sample`."""
        validation.check_sequence(token_ids, self._model)
        async with self._policy(source, 1) as adapter:
            logprobs = await self._backend.compute_logprobs(adapter, token_ids)
        return Logprobs(tuple(logprobs), _spans(len(token_ids), source)[0])

    @property
    def _model(self) -> Model:
        if self._started is None:
            raise Unavailable("the engine is starting")
        return self._started

    @contextlib.asynccontextmanager
    async def _policy(
        self, source: AdapterSource | None, num_completions: int
    ) -> AsyncIterator[LoadedAdapter | None]:
        """Admit a request, and keep its policy live while the block runs."""
        with self._admitted(num_completions):
            if source is None:
                yield None
                return
            validation.check_source(source)
            async with self._adapters.use(source) as adapter:
                yield adapter

    @contextlib.contextmanager
    def _admitted(self, num_completions: int) -> Iterator[None]:
        if self._num_requests >= self._max_queued:
            raise Overloaded(
                f"{self._num_requests} requests are here, as many as may be",
                resource="requests",
                limit=self._max_queued,
            )
        self._num_requests += 1
        self._num_running += num_completions
        try:
            yield
        finally:
            self._num_requests -= 1
            self._num_running -= num_completions


@dataclass
class _Buffer:
    """Tokens of one completion that are not sent yet."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


async def _gathered(
    deltas: AsyncGenerator[Delta, None], chunk_tokens: int
) -> AsyncGenerator[Delta, None]:
    """`deltas` in pieces of at least `chunk_tokens` tokens, a completion's last one excepted."""
    buffers: defaultdict[int, _Buffer] = defaultdict(_Buffer)
    async for delta in deltas:
        buffer = buffers[delta.index]
        buffer.token_ids += delta.token_ids
        buffer.logprobs += delta.logprobs
        if delta.stop_reason is not None or len(buffer.token_ids) >= chunk_tokens:
            del buffers[delta.index]
            yield Delta(delta.index, buffer.token_ids, buffer.logprobs, delta.stop_reason)


def _chunk(index: int, delta: Delta, source: AdapterSource | None) -> CompletionChunk:
    return CompletionChunk(
        index=index,
        token_ids=tuple(delta.token_ids),
        logprobs=tuple(delta.logprobs),
        spans=_spans(len(delta.token_ids), source),
        stop_reason=delta.stop_reason,
    )


def _spans(num_tokens: int, source: AdapterSource | None) -> tuple[PolicySpan, ...]:
    """One span over all tokens; of none, none. `source` None: the base model."""
    if not num_tokens:
        return ()
    if source is None:
        return (PolicySpan(num_tokens, BASE_VERSION, ""),)
    # Adapters has checked that the tensors which it loaded have this digest.
    return (PolicySpan(num_tokens, source.policy_version, source.digest),)
