"""vLLM's AsyncLLM with multi-LoRA, on GPUs and CPUs: the engine in processes of its own.

What a slot holds is read back before a load returns, and every step of the engine is checked
against what its requests asked for (`vllm_worker`): an engine that samples from another policy dies
of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from rollmesh.errors import BY_REASON, Unavailable
from services.sampler.backends.base import Model
from services.sampler.cache import cache_folder

# vLLM reads these when it is imported. Its children must be spawned: this process has threads.
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# The checks and draws in the worker are made for the model runner that runs everywhere.
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
# A stop string is found in this process. Of many outputs at once, vLLM would tell the caller first
# and the engine later, which may be told to unload the adapter in between.
os.environ["VLLM_V1_OUTPUT_PROC_CHUNK_SIZE"] = str(2**30)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from services.sampler.backends.constraints import Constraints
from services.sampler.backends.vllm_arguments import engine_args
from services.sampler.backends.vllm_life import Watch, reported
from services.sampler.backends.vllm_sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Sequence
    from pathlib import Path

    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

    from rollmesh.types import Continuation
    from services.sampler.backends.base import Delta, Draw, LoadedAdapter
    from services.sampler.config import SamplerConfig

_ALIVE_S = 0.25
"""Pause between two looks at whether the engine is alive."""


class VllmBackend:
    """A Backend.

    Prefix caching is on: a block's key holds the adapter's name and path, neither of which is ever
    used twice (`_gen_lora_extra_hash_keys` in vLLM's v1/core/kv_cache_utils.py), and the project as
    its salt.
    """

    name = "vllm"

    def __init__(self, config: SamplerConfig) -> None:
        self._config = config
        self._engine: AsyncLLM | None = None
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="vllm-start")
        self._starting: asyncio.Future[None] | None = None
        self._request_ids = itertools.count()
        # Shared with vLLM's processes: their signs of life, and their last words.
        self._shared = contextlib.ExitStack()
        self._folder: Path | None = None
        self._watch: Watch | None = None
        self._constraints: Constraints | None = None
        self._others: list[multiprocessing.process.BaseProcess] = []

    async def start(self) -> Model:
        """Start the engine's processes; return once the model is loaded."""
        loop = asyncio.get_running_loop()
        self._others = multiprocessing.active_children()
        self._folder = self._shared.enter_context(cache_folder(self._config.cache_dir, 0))
        args = engine_args(self._config, self._folder)
        self._starting = loop.run_in_executor(self._starter, self._build, args)
        await asyncio.shield(self._starting)
        engine = self._alive()
        self._watch = Watch(self._folder)
        self._constraints = Constraints(
            self._config.base_model.source, engine.model_config.get_vocab_size()
        )
        cache = engine.vllm_config.cache_config
        return Model(
            vocab_size=engine.model_config.get_vocab_size(),
            max_length=engine.model_config.max_model_len,
            max_loras=self._config.max_loras,
            kv_tokens=cache.num_gpu_blocks * cache.block_size,
        )

    def _children(self) -> list[multiprocessing.process.BaseProcess]:
        """The engine's processes: those that this one did not have before."""
        children = multiprocessing.active_children()
        return [child for child in children if child not in self._others]

    def _build(self, args: AsyncEngineArgs) -> None:
        self._engine = AsyncLLM.from_engine_args(args)

    async def stop(self) -> None:
        """End the engine and its processes; what still runs there is aborted."""
        if self._constraints is not None:
            await self._constraints.close()
        if self._starting is not None:
            while not self._starting.done():
                # vLLM cannot be told to stop starting, but it notices the death of its process.
                for child in self._children():
                    child.kill()
                await asyncio.sleep(_ALIVE_S)
            with contextlib.suppress(Exception):  # start has told it, if it still waited
                await self._starting
        if self._engine is not None:
            if self._engine.output_handler is not None:
                # Or it logs the end of the engine's process as an error.
                self._engine.output_handler.cancel()
            await asyncio.to_thread(self._engine.shutdown)
            for child in self._children():
                await asyncio.to_thread(child.join)  # vLLM may have killed it a moment ago
            # Its __del__ would shut it down once more, in the middle of the interpreter's end.
            self._engine = None
        self._starter.shutdown()
        self._watch = None
        self._shared.close()

    async def failure(self) -> str:
        """Wait until the engine is dead."""
        while not self._alive().errored:  # noqa: ASYNC110 - vLLM offers a flag, no event
            await asyncio.sleep(_ALIVE_S)
        return self._last_words() or "vLLM's engine died; its own log says why"

    def _last_words(self) -> str:
        return "" if self._folder is None else reported(self._folder)

    def silent_s(self) -> float:
        """Age of the last sign of life of the process that is silent longest."""
        return 0.0 if self._watch is None else self._watch.silent_s()

    async def load(self, adapter: LoadedAdapter) -> None:
        """Put an adapter into a slot of every worker, which read it back."""
        engine = self._alive()
        with self._engine_errors():
            # Cancelled, which a load is only at the end, it is not taken back: an engine that
            # stands still would answer nothing.
            outcomes = await engine.collective_rpc(
                "load_adapter",
                args=(adapter.number, str(adapter.folder), adapter.digest, adapter.config),
            )
        failed = next((outcome for outcome in outcomes if outcome), None)
        if failed:
            # Where there are several, some may have it.
            await self.unload(adapter)
            reason, text = failed
            raise BY_REASON[reason](
                f"vLLM cannot use {adapter.name}: {text}", resource=adapter.name, value=text
            )

    async def unload(self, adapter: LoadedAdapter) -> None:
        """Free its slot and memory."""
        with self._engine_errors():
            await self._alive().collective_rpc("unload_adapter", args=(adapter.number,))

    def sample(
        self,
        adapter: LoadedAdapter | None,
        prompt_token_ids: Sequence[int],
        completions: Sequence[Continuation],
        draw: Draw,
        *,
        project: str,
    ) -> AsyncGenerator[Delta, None]:
        """Draw completions."""
        return self._sampling().sample(
            adapter, list(prompt_token_ids), completions, draw, project=project
        )

    async def compute_logprobs(
        self, adapter: LoadedAdapter | None, token_ids: Sequence[int], *, project: str
    ) -> list[float]:
        """Log-probability of each token."""
        found = await self._sampling().prompt_logprobs(adapter, list(token_ids), 0, project=project)
        return list(found.logprobs)

    def _sampling(self) -> Sampling:
        engine = self._alive()
        assert self._constraints is not None  # noqa: S101 - made with the engine
        return Sampling(
            self._generate,
            engine.tokenizer,
            self._constraints,
            chunk_tokens=self._config.chunk_tokens,
        )

    async def _generate(
        self,
        adapter: LoadedAdapter | None,
        token_ids: list[int],
        params: SamplingParams,
        project: str,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of vLLM for one request, which ends in the engine when this is closed."""
        engine = self._alive()
        request_id = str(next(self._request_ids))
        # Never empty, which vLLM takes for none.
        prompt = tokens_input(token_ids, cache_salt=f"project {project}")
        lora = adapter and LoRARequest(adapter.name, adapter.number, str(adapter.folder))
        finished = False
        try:
            with self._engine_errors():
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
    def _engine_errors(self) -> Iterator[None]:
        try:
            yield
        except (EngineDeadError, EngineGenerateError) as error:
            raise Unavailable(f"the engine failed: {self._last_words() or error}") from error
