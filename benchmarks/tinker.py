"""How fast jobs of the Tinker SDK train through the gateway, and what the gateway itself costs.

`python -m benchmarks.tinker` prints tables, and as its last line one JSON object of numbers. A mesh
of this machine serves models/arith; every job is a thread with an unmodified SDK client and a key
of its own.

- steps_per_s_kK, tokens_per_s_kK: K jobs at once, each of STEPS steps after one that is not
  counted: sample PROMPTS × GROUP completions, wait REWARD_S for their rewards, forward_backward on
  all of them, optim_step. Steps and trained tokens of all jobs by the clock.
- PHASE_s_kK: median seconds of that phase; `sample` and `forward_backward` until the result is
  there, each after the other.
- gateway_overhead_ms: a `forward` of one short datum over HTTP, less the same through FutureService
  directly; medians of calls that take turns. sdk_overhead_ms: the SDK's own part beside that.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tinker
import yaml
from tinker import types

from benchmarks.tinker_overhead import overhead
from rollmesh.client import Client
from services.local.config import LocalConfig
from services.local.mesh import mesh

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
BASE_MODEL = "arith"
VOCAB_SIZE = 104
JOBS = (1, 2, 4, 8)
STEPS = 8
PROMPTS, GROUP = 8, 8
PROMPT_TOKENS, MAX_TOKENS = 16, 16
RANK = 8
REWARD_S = 1.0
ADAM = types.AdamParams(learning_rate=1e-4)
PHASES = (
    "save_weights_and_get_sampling_client",
    "sample",
    "reward",
    "forward_backward",
    "optim_step",
)

Figures = dict[str, float]


def main() -> None:
    """Print the tables and the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, nargs="+", default=JOBS, help="at once, each a row")
    parser.add_argument("--steps", type=int, default=STEPS, help="counted, of each job")
    parser.add_argument("--calls", type=int, default=200, help="of each way to call")
    parser.add_argument("--reward-s", type=float, default=REWARD_S, help="seconds a reward takes")
    parser.add_argument("--backend", default="auto", help="of the sampler: vllm, transformers")
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(measure(arguments))))  # noqa: T201


async def measure(arguments: argparse.Namespace) -> Figures:
    """All of it."""
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        async with (
            mesh(_config(arguments.backend), Path(folder), say=lambda _: None) as running,
            Client(running.address) as client,
        ):
            url = running.gateway_url
            assert url is not None  # noqa: S101 - it has one
            most = max(arguments.jobs)
            keys = [(await client.keys.create(f"projects/job-{n}"))[1] for n in range(most)]
            print(f"{os.cpu_count()} processors; reward after {arguments.reward_s:g} s")  # noqa: T201
            for count in arguments.jobs:
                jobs = Jobs(url, count, arguments.steps, arguments.reward_s)
                figures |= await jobs.run(keys[:count])
            figures |= await overhead(client, url, keys[0], "projects/job-0", arguments.calls)
    return figures


def _config(backend: str) -> LocalConfig:
    """The mesh of examples/tinker/local.yaml, with room for all jobs."""
    path = ROOT / "examples" / "tinker" / "local.yaml"
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    for member in (*values["trainers"], *values["samplers"]):
        member["base_model"]["path"] = str(ROOT / "models" / "arith")
    (sampler,) = values["samplers"]
    sampler |= {"backend": backend, "max_rank": RANK, "max_loras": max(JOBS)}
    if backend == "transformers":
        sampler.pop("kv_cache_memory")
    values["coordinator"] = {}
    values["gateway"] = {}
    return LocalConfig.parse(values, source=str(path))


class Jobs:
    """Some jobs at once, which begin to count together."""

    def __init__(self, url: str, count: int, steps: int, reward_s: float) -> None:
        self._url = url
        self._count = count
        self._steps = steps
        self._reward_s = reward_s
        self._begin = threading.Barrier(count)
        self._seconds: dict[str, list[float]] = collections.defaultdict(list)

    async def run(self, keys: list[str]) -> Figures:
        """The figures of them."""
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(asyncio.to_thread(self._job, number, key))
                for number, key in enumerate(keys)
            ]
        begun, ended, tokens = zip(*(task.result() for task in running), strict=True)
        wall_s = max(ended) - min(begun)
        figures = {
            "steps_per_s": self._count * self._steps / wall_s,
            "tokens_per_s": sum(tokens) / wall_s,
        }
        print(  # noqa: T201
            f"\n{self._count} jobs: {figures['steps_per_s']:.2f} steps/s, "
            f"{figures['tokens_per_s']:,.0f} tokens/s"
        )
        for phase in PHASES:
            seconds = self._seconds[phase]
            figures[f"{phase}_s"] = statistics.median(seconds)
            print(  # noqa: T201
                f"  {phase:<38} {figures[f'{phase}_s']:7.3f} s "
                f"({min(seconds):.3f} to {max(seconds):.3f})"
            )
        return {f"{name}_k{self._count}": round(each, 4) for name, each in figures.items()}

    def _job(self, number: int, key: str) -> tuple[float, float, int]:
        """When it began and ended to count, and the tokens that it has trained between."""
        rng = np.random.default_rng(number)
        with tinker.ServiceClient(base_url=self._url, api_key=key) as service:
            training = service.create_lora_training_client(
                BASE_MODEL, rank=RANK, seed=number, train_unembed=False
            ).result()
            for _ in self._step(training, rng):
                pass  # its times do not count
            self._begin.wait()
            begun, tokens = time.perf_counter(), 0
            for _ in range(self._steps):
                for phase, seconds, trained in self._step(training, rng):
                    self._seconds[phase].append(seconds)
                    tokens += trained
            return begun, time.perf_counter(), tokens

    def _step(
        self, training: tinker.TrainingClient, rng: np.random.Generator
    ) -> Iterator[tuple[str, float, int]]:
        """Phase, seconds and trained tokens of each part of one step."""
        start = time.perf_counter()

        def lap() -> float:
            nonlocal start
            before, start = start, time.perf_counter()
            return start - before

        sampler = training.save_weights_and_get_sampling_client().result()
        yield PHASES[0], lap(), 0
        prompts = rng.integers(8, VOCAB_SIZE, (PROMPTS, PROMPT_TOKENS)).tolist()
        # No end but the length: every step is as long as every other.
        params = types.SamplingParams(max_tokens=MAX_TOKENS, stop=[])
        drawing = [sampler.sample(types.ModelInput.from_ints(p), GROUP, params) for p in prompts]
        drawn = [future.result().sequences for future in drawing]
        yield "sample", lap(), 0
        time.sleep(self._reward_s)
        yield "reward", lap(), 0
        data = [
            _datum(prompt, each.tokens, each.logprobs or [], rng.normal())
            for prompt, group in zip(prompts, drawn, strict=True)
            for each in group
        ]
        training.forward_backward(data, "importance_sampling").result()
        yield "forward_backward", lap(), sum(datum.model_input.length for datum in data)
        training.optim_step(ADAM).result()
        yield "optim_step", lap(), 0


def _datum(
    prompt: list[int], tokens: list[int], logprobs: list[float], advantage: float
) -> types.Datum:
    before = len(prompt) - 1
    inputs: dict[str, Any] = {
        "target_tokens": [0] * before + tokens,
        "logprobs": [0.0] * before + logprobs,
        "advantages": [0.0] * before + [advantage] * len(tokens),
    }
    return types.Datum(types.ModelInput.from_ints(prompt + tokens[:-1]), inputs)


if __name__ == "__main__":
    main()
