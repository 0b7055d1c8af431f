"""transformers' own models with PEFT adapters: for machines that vLLM has no wheel for.

Simple and slow: requests take turns token by token in one compute thread, and only the completions
of one request are computed together. Draws the same distribution as vLLM from the same seed, but
not the same tokens: the random streams are others.

Shapes: N completions that still run, V tokens in the vocabulary.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from rollmesh.errors import FailedPrecondition
from services.sampler.backends.base import Delta, Model
from services.sampler.validation import mixed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

    from rollmesh.types import StopReason
    from services.sampler.backends.base import Draw, LoadedAdapter
    from services.sampler.config import SamplerConfig

_Result = TypeVar("_Result")


class TransformersBackend:
    """A Backend."""

    name = "transformers"

    def __init__(self, config: SamplerConfig) -> None:
        self._config = config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._engine = _Engine()

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

    async def load(self, adapter: LoadedAdapter) -> None:
        """Put an adapter on the model."""
        try:
            await self._compute(self._engine.load, adapter)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
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
        num_completions: int,
        draw: Draw,
    ) -> AsyncGenerator[Delta, None]:
        """Draw completions, one token of each at a time. No step is taken that nobody waits for."""
        group = await self._compute(
            self._engine.begin, adapter, list(prompt_token_ids), num_completions, draw
        )
        while group.running:
            for delta in await self._compute(self._engine.step, group):
                yield delta

    async def compute_logprobs(
        self, adapter: LoadedAdapter | None, token_ids: Sequence[int]
    ) -> list[float]:
        """Log-probability of each token given those before it."""
        return await self._compute(self._engine.compute_logprobs, adapter, list(token_ids))

    async def _compute(self, work: Callable[..., _Result], *args: object) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)


@dataclass
class _Group:
    """The completions of one request. Lists of N run along the rows of the batch."""

    adapter: LoadedAdapter | None
    draw: Draw
    running: list[int]
    """N indices of completions."""
    generators: list[torch.Generator]
    cache: DynamicCache
    next_logits_NV: torch.Tensor  # noqa: N815 - the suffix is the shape
    token_ids: list[list[int]]
    """What each completion has so far, by index."""

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        if len(rows) == len(self.running):
            return
        self.running = [self.running[row] for row in rows]
        self.generators = [self.generators[row] for row in rows]
        self.cache.batch_select_indices(torch.tensor(rows, dtype=torch.long))


class _Engine:
    """The synchronous part, which lives in the compute thread."""

    def start(self, config: SamplerConfig) -> Model:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        path = config.base_model.source
        dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self._base: Any = base.to(self._device).eval()
        self._peft: Any = None
        self._eos = _eos_token_ids(self._base, self._tokenizer)
        longest: int = self._base.config.max_position_embeddings
        if config.max_length is not None and config.max_length > longest:
            raise ValueError(f"max_length: {config.max_length}, the model's own is {longest}")
        return Model(self._base.config.vocab_size, config.max_length or longest)

    def load(self, adapter: LoadedAdapter) -> None:
        config = PeftConfig.from_pretrained(adapter.folder)
        config.inference_mode = True
        name = _peft_name(adapter)
        if self._peft is None:
            self._peft = PeftModel(self._base, config, adapter_name=name)
        else:
            self._peft.add_adapter(name, config)
        tensors = load_file(adapter.folder / "adapter_model.safetensors")
        result = set_peft_model_state_dict(self._peft, tensors, adapter_name=name)
        wrong = [key for key in result.missing_keys if f".{name}." in key]
        wrong += result.unexpected_keys
        if wrong:
            # PEFT itself would leave out the ones, and the others at their random start.
            self.unload(adapter)
            raise ValueError(f"tensors do not match its configuration: {', '.join(wrong)}")
        self._peft.eval()

    def unload(self, adapter: LoadedAdapter) -> None:
        name = _peft_name(adapter)
        if len(self._peft.peft_config) > 1:
            # PEFT warns when the active adapter goes.
            self._peft.set_adapter(next(other for other in self._peft.peft_config if other != name))
            self._peft.delete_adapter(name)
        else:
            self._base, self._peft = self._peft.unload(), None

    @torch.inference_mode()
    def begin(
        self,
        adapter: LoadedAdapter | None,
        prompt_token_ids: list[int],
        num_completions: int,
        draw: Draw,
    ) -> _Group:
        """Read the prompt, once for all completions."""
        cache = DynamicCache(config=self._base.config)
        logits_1V = self._next_logits(adapter, [prompt_token_ids], cache)  # noqa: N806
        cache.batch_repeat_interleave(num_completions)
        return _Group(
            adapter=adapter,
            draw=draw,
            running=list(range(num_completions)),
            generators=[
                torch.Generator(self._device).manual_seed(mixed(draw.seed, index))
                for index in range(num_completions)
            ],
            cache=cache,
            next_logits_NV=logits_1V.expand(num_completions, -1),
            token_ids=[[] for _ in range(num_completions)],
        )

    @torch.inference_mode()
    def step(self, group: _Group) -> list[Delta]:
        """Draw one token of each completion that runs, and compute what follows it."""
        token_ids = _drawn(group.next_logits_NV, group.draw, group.generators)
        logprobs_NV = group.next_logits_NV.log_softmax(-1)  # noqa: N806
        logprobs = logprobs_NV.gather(1, token_ids[:, None]).squeeze(1).tolist()
        deltas = []
        for index, token_id, logprob in zip(
            group.running, token_ids.tolist(), logprobs, strict=True
        ):
            group.token_ids[index].append(token_id)
            reason = self._stop_reason(group.token_ids[index], group.draw)
            deltas.append(Delta(index, [token_id], [logprob], reason))
        going_on = [row for row, delta in enumerate(deltas) if delta.stop_reason is None]
        group.keep(going_on)
        if going_on:
            batch = [[group.token_ids[index][-1]] for index in group.running]
            group.next_logits_NV = self._next_logits(group.adapter, batch, group.cache)
        return deltas

    @torch.inference_mode()
    def compute_logprobs(self, adapter: LoadedAdapter | None, token_ids: list[int]) -> list[float]:
        tokens_1T = torch.tensor([token_ids], device=self._device)  # noqa: N806
        with self._policy(adapter) as model:
            logits_TV = model(input_ids=tokens_1T[:, :-1]).logits[0].float()  # noqa: N806
        logprobs = logits_TV.log_softmax(-1).gather(1, tokens_1T[0, 1:, None]).squeeze(1)
        return [math.nan, *logprobs.tolist()]

    def _next_logits(
        self, adapter: LoadedAdapter | None, batch: list[list[int]], cache: DynamicCache
    ) -> torch.Tensor:
        """Float32 logits [N, V] of what follows `batch`, which `cache` takes in."""
        with self._policy(adapter) as model:
            output = model(
                input_ids=torch.tensor(batch, device=self._device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    @contextlib.contextmanager
    def _policy(self, adapter: LoadedAdapter | None) -> Iterator[Any]:
        if self._peft is None:
            yield self._base
        elif adapter is None:
            with self._peft.disable_adapter():
                yield self._peft
        else:
            if self._peft.active_adapter != _peft_name(adapter):
                self._peft.set_adapter(_peft_name(adapter), inference_mode=True)
            yield self._peft

    def _stop_reason(self, token_ids: list[int], draw: Draw) -> StopReason | None:
        if token_ids[-1] in draw.stop_token_ids:
            return "stop"
        if token_ids[-1] in self._eos and not draw.ignore_eos:
            return "stop"
        if draw.stop:
            text = self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
            # It was not there a token ago, so this token completes it.
            if any(stop in text for stop in draw.stop):
                return "stop"
        return "length" if len(token_ids) >= draw.max_tokens else None


def _peft_name(adapter: LoadedAdapter) -> str:
    # Without dots, and unlike any part of the name of a layer.
    return f"adapter{adapter.number}"


def _eos_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """End of sequence as the tokenizer and the model's generation_config.json name it."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {token_id for token_id in [tokenizer.eos_token_id, *ids] if token_id is not None}


def _drawn(
    logits_NV: torch.Tensor,  # noqa: N803
    draw: Draw,
    generators: list[torch.Generator],
) -> torch.Tensor:
    """One token id of each row, [N]."""
    if draw.temperature == 0:
        return logits_NV.argmax(-1)
    logits_NV = logits_NV / draw.temperature  # noqa: N806
    if draw.top_k:
        least_N1 = logits_NV.topk(draw.top_k).values[:, -1:]  # noqa: N806
        logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -math.inf)  # noqa: N806
    probs_NV = logits_NV.softmax(-1)  # noqa: N806
    if draw.top_p < 1:
        sorted_NV, order_NV = probs_NV.sort(-1, descending=True)  # noqa: N806
        # A token stays if those before it do not make up top_p yet; so the first always does.
        before_NV = sorted_NV.cumsum(-1) - sorted_NV  # noqa: N806
        sorted_NV = sorted_NV.masked_fill(before_NV >= draw.top_p, 0.0)  # noqa: N806
        probs_NV = torch.zeros_like(probs_NV).scatter(1, order_NV, sorted_NV)  # noqa: N806
    # multinomial normalises.
    rows = [
        torch.multinomial(row_V, 1, generator=generator)
        for row_V, generator in zip(probs_NV, generators, strict=True)
    ]
    return torch.cat(rows)
