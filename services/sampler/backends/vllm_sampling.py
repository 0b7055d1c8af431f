"""How the completions of a request become requests of vLLM's, and their outputs deltas again."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from services.sampler.backends.base import Delta
from services.sampler.backends.vllm_requests import (
    StopStrings,
    asked_for,
    constraint_of,
    delta_of,
    missing_feature,
    params_of,
    prompt_logprobs_of,
    prompt_params,
    refused,
    withheld,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

    from rollmesh.types import Continuation, PromptLogprobs
    from services.sampler.backends.base import Draw, LoadedAdapter
    from services.sampler.backends.constraints import Constraints


class Generate(Protocol):
    """Outputs of vLLM for one request, which ends in the engine when this is closed."""

    def __call__(
        self,
        adapter: LoadedAdapter | None,
        token_ids: list[int],
        params: SamplingParams,
        project: str,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Begin one."""
        ...


class Sampling:
    """Samples with `generate`. `chunk_tokens` of a completion are waited for at a time."""

    def __init__(
        self, generate: Generate, tokenizer: Any, constraints: Constraints, *, chunk_tokens: int
    ) -> None:
        self._generate = generate
        self._tokenizer = tokenizer
        self._constraints = constraints
        self._chunk_tokens = chunk_tokens

    async def sample(
        self,
        adapter: LoadedAdapter | None,
        prompt: list[int],
        completions: Sequence[Continuation],
        draw: Draw,
        *,
        project: str,
    ) -> AsyncGenerator[Delta, None]:
        """Draw completions: those that begin as one request of vLLM's, each other as its own."""
        await self._check_constraint(draw)
        top: PromptLogprobs | None = None
        if draw.prompt_logprobs is not None:
            # A request of its own, which cannot read the prefix cache but fills it for the others.
            top = await self.prompt_logprobs(adapter, prompt, draw.prompt_logprobs, project=project)
        fresh = [completion.index for completion in completions if not completion.token_ids]
        streams = [
            self._continued(adapter, prompt, completion, draw, project=project)
            for completion in completions
            if completion.token_ids
        ]
        # vLLM multiplies no greedy requests.
        together = [fresh] if draw.temperature else [[index] for index in fresh]
        streams += [
            self._begun(adapter, prompt, indices, draw, project=project)
            for indices in together
            if indices
        ]
        async with contextlib.aclosing(interleaved(streams)) as deltas:
            async for delta in deltas:
                yield replace(delta, prompt_logprobs=top)
                top = None

    async def _check_constraint(self, draw: Draw) -> None:
        constraint = constraint_of(draw)
        if constraint is not None:
            reason = await self._constraints.refusal(*constraint) or missing_feature(*constraint)
            if reason:
                raise refused(constraint, reason)

    async def _begun(
        self,
        adapter: LoadedAdapter | None,
        prompt: list[int],
        indices: list[int],
        draw: Draw,
        *,
        project: str,
    ) -> AsyncGenerator[Delta, None]:
        asked = asked_for(adapter, draw, indices, 0, project=project)
        params = params_of(draw, asked, chunk_tokens=self._chunk_tokens)
        outputs = self._generate(adapter, prompt, params, project)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                for piece in output.outputs:
                    yield delta_of(piece, indices[piece.index], draw)

    async def _continued(
        self,
        adapter: LoadedAdapter | None,
        prompt: list[int],
        completion: Continuation,
        draw: Draw,
        *,
        project: str,
    ) -> AsyncGenerator[Delta, None]:
        had, index = completion.token_ids, completion.index
        if constraint_of(draw) is not None:
            # vLLM's grammar begins with the request. The same draws give the same tokens again.
            num_seen = 0
            again = self._begun(adapter, prompt, [index], draw, project=project)
            async with contextlib.aclosing(again):
                async for delta in again:
                    new = withheld(delta, had, num_seen)
                    num_seen += len(delta.token_ids)
                    if new.token_ids or new.stop_reason:
                        yield new
            return
        if len(had) >= draw.max_tokens:
            yield Delta(index, (), (), "length")
            return
        asked = asked_for(adapter, draw, [index], len(had), project=project)
        params = params_of(replace(draw, stop=()), asked, chunk_tokens=self._chunk_tokens)
        stops = StopStrings(
            self._tokenizer,
            prompt,
            had,
            params_of(draw, asked, chunk_tokens=self._chunk_tokens),
        )
        outputs = self._generate(adapter, [*prompt, *had], params, project)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                delta = stops.cut(delta_of(output.outputs[0], index, draw))
                yield delta
                if delta.stop_reason:
                    return

    async def prompt_logprobs(
        self, adapter: LoadedAdapter | None, prompt: list[int], num_top: int, *, project: str
    ) -> PromptLogprobs:
        """Of each token of `prompt`, with those of the `num_top` likeliest."""
        params = prompt_params(asked_for(adapter, None, [0], 0, project=project), num_top)
        async with contextlib.aclosing(self._generate(adapter, prompt, params, project)) as outputs:
            output = await anext(outputs)
        return prompt_logprobs_of(output.prompt_logprobs, num_top)


async def interleaved(
    streams: Sequence[AsyncGenerator[Delta, None]],
) -> AsyncGenerator[Delta, None]:
    """The deltas of all streams as they come; closing it closes them."""
    async with contextlib.AsyncExitStack() as stack:
        for stream in streams:
            await stack.enter_async_context(contextlib.aclosing(stream))
        if len(streams) == 1:
            async for delta in streams[0]:
                yield delta
            return
        waiting = {asyncio.ensure_future(anext(stream)): stream for stream in streams}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    stream = waiting.pop(task)
                    with contextlib.suppress(StopAsyncIteration):
                        delta = task.result()
                        waiting[asyncio.ensure_future(anext(stream))] = stream
                        yield delta
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
