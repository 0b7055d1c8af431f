"""vLLM itself, in a process of its own and with nothing around it.

It is started with the sampler's own arguments, but as vLLM's plain worker: it neither checks which
adapter a token is of, nor draws from counted seeds (its own seeded draws are several times slower,
so it is asked for none).
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from services.sampler.config import SamplerConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.connection import Connection

Worker = Literal["StockWorker", "KernelsWorker"]


@dataclass(frozen=True, slots=True)
class Work:
    """Requests that are all made at once: completions of prompt i are of adapter i, in turns.

    No adapters: of the base model. `logprobs`: also of every token drawn, as the sampler has it.
    """

    prompts: Sequence[Sequence[int]]
    num_completions: int
    max_tokens: int
    adapters: Sequence[Path] = ()
    logprobs: bool = True

    @property
    def num_tokens(self) -> int:
        """Drawn by all of them."""
        return len(self.prompts) * self.num_completions * self.max_tokens


class RawEngine:
    """One engine."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def run(self, work: Work) -> float:
        """Tokens/s."""
        self._connection.send(work)
        seconds: float = self._connection.recv()
        return work.num_tokens / seconds


@contextlib.contextmanager
def raw_engine(settings: dict[str, Any], worker: Worker) -> Iterator[RawEngine]:
    """The engine of a sampler with these settings."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_main, args=(theirs, settings, worker))
    process.start()
    theirs.close()
    try:
        ours.recv()  # it has started
        yield RawEngine(ours)
    finally:
        ours.close()
        process.join()


def _main(connection: Connection, settings: dict[str, Any], worker: Worker) -> None:
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    with contextlib.suppress(EOFError), tempfile.TemporaryDirectory() as folder:
        asyncio.run(
            _serve(connection, SamplerConfig.model_validate(settings), Path(folder), worker)
        )


async def _serve(
    connection: Connection, config: SamplerConfig, folder: Path, worker: Worker
) -> None:
    # vLLM in this process alone.
    from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

    from services.sampler.backends.vllm_arguments import engine_args  # noqa: PLC0415

    args = engine_args(config, folder)
    args.worker_cls = f"benchmarks.sampler_workers.{worker}"
    engine = AsyncLLM.from_engine_args(args)
    requests = _Requests(engine)
    try:
        connection.send(None)
        while True:
            work: Work = await asyncio.to_thread(connection.recv)
            begin = time.perf_counter()
            await requests.run(work)
            connection.send(time.perf_counter() - begin)
    finally:
        engine.shutdown()


class _Requests:
    """Makes requests of vLLM, with ids never used before."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._numbers: dict[Path, int] = {}
        self._count = 0

    async def run(self, work: Work) -> None:
        async with asyncio.TaskGroup() as tasks:
            for index, prompt in enumerate(work.prompts):
                adapter = work.adapters[index % len(work.adapters)] if work.adapters else None
                tasks.create_task(self._sample(work, prompt, adapter))

    async def _sample(self, work: Work, prompt: Sequence[int], adapter: Path | None) -> None:
        from vllm.inputs import tokens_input  # noqa: PLC0415
        from vllm.lora.request import LoRARequest  # noqa: PLC0415
        from vllm.sampling_params import RequestOutputKind, SamplingParams  # noqa: PLC0415

        lora = None
        if adapter is not None:
            number = self._numbers.setdefault(adapter, len(self._numbers) + 1)
            lora = LoRARequest(str(number), number, str(adapter))
        params = SamplingParams(
            n=work.num_completions,
            temperature=1.0,
            max_tokens=work.max_tokens,
            ignore_eos=True,
            logprobs=0 if work.logprobs else None,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            stream_interval=16,
        )
        self._count += 1
        async for _ in self._engine.generate(
            tokens_input(list(prompt)), params, str(self._count), lora_request=lora
        ):
            pass
