"""vLLM's AsyncLLM with multi-LoRA, on GPUs and CPUs: the engine in processes of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import multiprocessing
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, cast, get_args

from rollmesh.errors import FailedPrecondition, Unavailable
from services.sampler.backends.base import Delta, Model

# vLLM reads these when it is imported. Its children must be spawned: this process has threads.
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from safetensors import safe_open
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from services.sampler.backends.vllm_executor import OwnedExecutor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Sequence

    from vllm.outputs import RequestOutput

    from rollmesh.types import StopReason
    from services.sampler.backends.base import Draw, LoadedAdapter
    from services.sampler.config import SamplerConfig

_VOCABULARY = re.compile(r"\b(embed_tokens|lm_head)\b")
_STOP_REASONS: dict[str, StopReason] = {"stop": "stop", "length": "length"}
_ALIVE_S = 0.25
"""Pause between two looks at whether the engine is alive."""


class VllmBackend:
    """A Backend.

    Prefix caching is on: a block's key holds the adapter's name and path, neither of which is ever
    used twice (`_gen_lora_extra_hash_keys` in vLLM's v1/core/kv_cache_utils.py).
    """

    name = "vllm"

    def __init__(self, config: SamplerConfig) -> None:
        self._config = config
        self._engine: AsyncLLM | None = None
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="vllm-start")
        self._starting: asyncio.Future[None] | None = None
        self._request_ids = itertools.count()

    async def start(self) -> Model:
        """Start the engine's processes; return once the model is loaded."""
        loop = asyncio.get_running_loop()
        self._starting = loop.run_in_executor(self._starter, self._build)
        await asyncio.shield(self._starting)
        model = self._alive().model_config
        return Model(vocab_size=model.get_vocab_size(), max_length=model.max_model_len)

    def _build(self) -> None:
        args = _engine_args(self._config)
        self._engine = AsyncLLM.from_engine_args(args)

    async def stop(self) -> None:
        """End the engine and its processes; what still runs there is aborted."""
        if self._starting is not None:
            while not self._starting.done():
                # vLLM cannot be told to stop starting, but it notices the death of its process.
                for child in multiprocessing.active_children():
                    child.kill()
                await asyncio.sleep(_ALIVE_S)
            with contextlib.suppress(Exception):  # start has told it, if it still waited
                await self._starting
        if self._engine is not None:
            if self._engine.output_handler is not None:
                # Or it logs the end of the engine's process as an error.
                self._engine.output_handler.cancel()
            await asyncio.to_thread(self._engine.shutdown)
            for child in multiprocessing.active_children():
                await asyncio.to_thread(child.join)  # vLLM may have killed it a moment ago
            # Its __del__ would shut it down once more, in the middle of the interpreter's end.
            self._engine = None
        self._starter.shutdown()

    async def failure(self) -> str:
        """Wait until the engine is dead."""
        while not self._alive().errored:  # noqa: ASYNC110 - vLLM offers a flag, no event
            await asyncio.sleep(_ALIVE_S)
        return "vLLM's engine died; its own log says why"

    async def load(self, adapter: LoadedAdapter) -> None:
        """Read an adapter into the engine's main memory and into a slot."""
        _refuse_vocabulary(adapter)
        with _engine_errors():
            try:
                await self._alive().add_lora(_lora(adapter))
            except EngineDeadError:
                raise
            except Exception as error:
                # What a worker raises arrives as a bare Exception with its text.
                raise FailedPrecondition(
                    f"vLLM cannot use {adapter.name}: {error}", resource=adapter.name
                ) from error

    async def unload(self, adapter: LoadedAdapter) -> None:
        """Free its slot and memory."""
        with _engine_errors():
            await self._alive().remove_lora(adapter.number)

    async def sample(
        self,
        adapter: LoadedAdapter | None,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        draw: Draw,
    ) -> AsyncGenerator[Delta, None]:
        """Draw completions, each from a random stream of its own (vLLM counts the seed up)."""
        params = SamplingParams(
            n=num_completions,
            temperature=draw.temperature,
            top_k=draw.top_k,
            top_p=draw.top_p,
            seed=draw.seed,
            max_tokens=draw.max_tokens,
            stop=list(draw.stop),
            stop_token_ids=list(draw.stop_token_ids),
            ignore_eos=draw.ignore_eos,
            # Of the sampled token alone; raw: before temperature and truncation.
            logprobs=0,
            flat_logprobs=True,
            # Text is made only to look for stop strings, special tokens included.
            detokenize=bool(draw.stop),
            skip_special_tokens=False,
            include_stop_str_in_output=True,
            output_kind=RequestOutputKind.DELTA,
            stream_interval=self._config.chunk_tokens,
        )
        outputs = self._generate(adapter, prompt_token_ids, params)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                for piece in output.outputs:
                    if piece.finish_reason not in {None, *_STOP_REASONS}:
                        raise Unavailable(f"the engine broke off: {piece.finish_reason}")
                    yield Delta(
                        index=piece.index,
                        token_ids=piece.token_ids,
                        logprobs=piece.logprobs.logprobs,
                        stop_reason=_STOP_REASONS.get(piece.finish_reason),
                    )

    async def compute_logprobs(
        self, adapter: LoadedAdapter | None, token_ids: Sequence[int]
    ) -> list[float]:
        """Log-probability of each token; the token that vLLM has to draw as well is thrown away."""
        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async with contextlib.aclosing(self._generate(adapter, token_ids, params)) as outputs:
            output = await anext(outputs)
        return [math.nan, *output.prompt_logprobs.logprobs]

    async def _generate(
        self, adapter: LoadedAdapter | None, token_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of vLLM for one request, which ends in the engine when this is closed."""
        engine = self._alive()
        request_id = str(next(self._request_ids))
        prompt = tokens_input(list(token_ids))
        lora = None if adapter is None else _lora(adapter)
        finished = False
        try:
            with _engine_errors():
                async for output in engine.generate(prompt, params, request_id, lora_request=lora):
                    finished = output.finished
                    yield output
        finally:
            # vLLM aborts by itself once its iterator is closed, which for a dropped iterator is
            # when the garbage collector comes by; the adapter's files may be gone by then.
            if not finished and not engine.errored:
                await engine.abort(request_id)

    def _alive(self) -> AsyncLLM:
        if self._engine is None:
            raise Unavailable("the engine is starting")
        return self._engine


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    try:
        yield
    except (EngineDeadError, EngineGenerateError) as error:
        raise Unavailable(f"the engine failed: {error}") from error


def _refuse_vocabulary(adapter: LoadedAdapter) -> None:
    """Refuse adapters of the embeddings: vLLM takes the wrong ones for log-probs of prompts."""
    with safe_open(adapter.folder / "adapter_model.safetensors", "numpy") as file:
        names = [name for name in file.keys() if _VOCABULARY.search(name)]  # noqa: SIM118 - no dict
    if names:
        raise FailedPrecondition(
            f"{adapter.name} adapts the embeddings, which this backend cannot: {names[0]}",
            resource=adapter.name,
            value=names[0],
        )


def _lora(adapter: LoadedAdapter) -> LoRARequest:
    return LoRARequest(adapter.name, adapter.number, str(adapter.folder))


def _engine_args(config: SamplerConfig) -> AsyncEngineArgs:
    """Arguments of vLLM. On a CPU this sets the environment that its processes inherit, too."""
    on_cpu = current_platform.is_cpu()
    if on_cpu:
        # With LoRA, vLLM compiles nothing on a CPU but two tiny functions of its sampler, for
        # which the first batch waits up to half a minute, and which need a C++ compiler.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        if config.num_threads is not None:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            os.environ["OMP_NUM_THREADS"] = str(config.num_threads)
            # Cores that are shared: a thread that waits by spinning takes from those it waits for.
            # With two threads on two busy cores that made sampling 15 times slower.
            os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    ranks = cast("tuple[int, ...]", get_args(MaxLoRARanks))
    return AsyncEngineArgs(
        model=config.base_model.source,
        dtype=config.dtype,
        max_model_len=config.max_length,
        max_num_seqs=config.max_num_seqs,
        enable_lora=True,
        max_loras=config.max_loras,
        max_cpu_loras=config.max_cpu_loras,
        max_lora_rank=next(rank for rank in ranks if rank >= config.max_rank),
        tensor_parallel_size=config.tensor_parallel_size,
        enforce_eager=config.enforce_eager,
        kv_cache_memory_bytes=config.kv_cache_memory or (2**30 if on_cpu else None),
        enable_prefix_caching=True,
        # A prompt that is split over two batches makes vLLM move the random generator of a seeded
        # request back, which a CPU generator cannot: the whole engine died of it.
        enable_chunked_prefill=not on_cpu,
        logprobs_mode="raw_logprobs",
        distributed_executor_backend=OwnedExecutor,
        worker_cls="services.sampler.backends.vllm_cpu.CpuWorker" if on_cpu else "auto",
        disable_log_stats=True,
    )
