"""A sampler that says what a test has it say, in tokens, and refuses what a real one refuses."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rollmesh import types
from services.sampler.backends.base import Model
from services.sampler.validation import check_prompt, resolve
from tests.fakes.mesh import FakeSampler

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rollmesh.errors import MeshError
    from rollmesh.tokenizer import ModelTokenizer

MODEL = Model(vocab_size=400, max_length=2048, max_loras=4)
TOP = (40, 41, -1), (-0.25, -2.0, -math.inf)
"""The likeliest tokens in every place: there are two, whatever is drawn."""
Script = Callable[[tuple[int, ...], int], Sequence[int]]


@dataclass(frozen=True)
class Drawn:
    """One request, and what its completions got, by index."""

    prompt: tuple[int, ...]
    params: types.SamplingParams
    source: types.AdapterSource | None
    token_ids: dict[int, list[int]]
    logprobs: dict[int, list[float]]


class Speaker(FakeSampler):
    """Draws a token a chunk. `script`: by prompt and index, the tokens that it would say."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.script: Script = lambda prompt, index: []
        self.drawn: list[Drawn] = []
        self.failure: MeshError | None = None  # in place of the next token
        self.hold_after: int | None = None  # tokens after which a completion waits for `sampling`

    def say(self, *texts: str) -> None:
        """Each in its turn, by index, with the token that ends a turn."""
        said = [self.tokenizer.ending(text) for text in texts]
        self.script = lambda prompt, index: said[index % len(said)]

    async def get_sampler(self) -> types.SamplerInfo:
        info = await super().get_sampler()
        return replace(info, vocab_size=MODEL.vocab_size, max_length=MODEL.max_length)

    async def sample(
        self,
        source: types.AdapterSource | None,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        params: types.SamplingParams,
        *,
        project: str,
        continuations: Sequence[types.Continuation] = (),
    ) -> AsyncIterator[types.CompletionChunk]:
        self.check_here()
        check_prompt(prompt_token_ids, MODEL, field="prompt_token_ids")
        draw = resolve(params, num_completions, len(prompt_token_ids), MODEL, lambda: 1)
        prompt = tuple(prompt_token_ids)
        drawn = Drawn(prompt, params, source, {}, {})
        self.drawn.append(drawn)
        await self._count(1)
        done = False
        try:
            wanted = continuations or [types.Continuation(n) for n in range(num_completions)]
            for begun in wanted:
                async for chunk in self._one(begun.index, drawn, draw, source):
                    yield chunk
            done = True
        finally:
            self.num_aborted += not done
            await self._count(-1)

    async def _one(self, index, drawn, draw, source):
        said = list(self.script(drawn.prompt, index))
        token_ids = drawn.token_ids[index] = []
        logprobs = drawn.logprobs[index] = []
        while True:
            if self.hold_after == len(token_ids):
                await self.sampling.wait()
            if self.failure:
                raise self.failure
            if not said[len(token_ids) :]:
                yield types.CompletionChunk(index, (), (), (), "stop")
                return
            token_ids.append(said[len(token_ids)])
            logprobs.append(-len(token_ids) / 8)
            text = self.tokenizer.decode(token_ids, skip_special_tokens=False)
            reason = None
            if len(token_ids) == len(said) or any(stop in text for stop in draw.stop):
                reason = "stop"
            elif len(token_ids) == draw.max_tokens:
                reason = "length"
            yield types.CompletionChunk(
                index,
                (token_ids[-1],),
                (logprobs[-1],),
                (self._span(source),),
                reason,
                top_token_ids=(TOP[0][: draw.top_logprobs],) if draw.top_logprobs else (),
                top_logprobs=(TOP[1][: draw.top_logprobs],) if draw.top_logprobs else (),
            )
            if reason:
                return
            await asyncio.sleep(0)
