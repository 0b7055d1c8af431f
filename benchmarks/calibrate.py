"""Service times of this machine for the simulator: `python -m benchmarks.calibrate [--out FILE]`.

A mesh of one sampler and one trainer with the model of models/arith, one thread each, asked as any
client asks: benchmarks/calibration/cpu.json is what it measured. Other work on the machine slows
all of it; the load is written down with the figures. Prints what it wrote.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from rollmesh.client import Client
from rollmesh.config import read_yaml
from rollmesh.types import AdamConfig, Datum, LoraConfig, LossConfig, PolicyRef, SamplingParams
from services.coordinator.simulation.calibration import Calibration
from services.local.config import LocalConfig
from services.local.mesh import ROOT, mesh

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

MODEL = "arith"
PROJECT = "projects/calibration"
ADAPTER = f"{PROJECT}/adapters/a"
SIZES = (1, 8, 32, 64)
"""Completions at once."""
DRAWN = 64
"""Tokens of each."""
PROMPTS = (16, 400)
"""Tokens of a short and of a long prompt; what a token of a prompt takes is the slope."""
STEPS = (1, 16)
"""Sequences of a small and of a large step."""
LENGTH = 100
"""Tokens of each of them."""
ROUNDS = 5
"""Of which the median is taken."""
FUSED_TOKENS = 2048
WORDS = range(4, 104)
"""Of the model's vocabulary; those before them have a meaning."""


class Calibrating:
    """A mesh with an adapter that has a published version."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._sequence = itertools.count(1)
        self._random = np.random.default_rng(0)
        self._version = 0

    async def draw(self, *, prompt: int, completions: int, tokens: int) -> float:
        """Seconds until all are there, of a prompt that nobody has computed before."""
        policy = PolicyRef(MODEL, ADAPTER, self._version)
        params = SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True)
        words = self._random.choice(list(WORDS), prompt).tolist()
        return await _seconds(
            self._client.sampling.sample(PROJECT, policy, words, completions, params)
        )

    async def step(self, sequences: int) -> float:
        """Seconds of a training step on so many sequences, its version published."""
        begin = time.perf_counter()
        training = self._client.training
        data = [self._datum() for _ in range(sequences)]
        loss = LossConfig("cross_entropy")
        await training.forward_backward(ADAPTER, next(self._sequence), data, loss)
        await training.optim_step(ADAPTER, next(self._sequence), AdamConfig(learning_rate=1e-4))
        self._version = (await self._client.adapters.publish(ADAPTER)).policy_version
        return time.perf_counter() - begin

    def _datum(self) -> Datum:
        words = self._random.choice(list(WORDS), LENGTH + 1).astype(np.int32)
        return Datum(words[:-1], words[1:], np.ones(LENGTH, np.float32), None, None)


async def _seconds(asked: Awaitable[object]) -> float:
    begin = time.perf_counter()
    await asked
    return time.perf_counter() - begin


async def measure() -> Calibration:
    """All fields; each is the median of ROUNDS after one that does not count."""
    with tempfile.TemporaryDirectory() as folder:
        async with (
            mesh(LocalConfig.model_validate(settings()), Path(folder)) as running,
            Client(running.address) as client,
        ):
            await client.adapters.create(ADAPTER, MODEL, LoraConfig(rank=16))
            calibrating = Calibrating(client)
            steps, first_tokens = await _steps(calibrating)
            drawing = [
                await _median(calibrating, prompt=PROMPTS[0], completions=size, tokens=DRAWN)
                for size in SIZES
            ]
            short, long = [
                await _median(calibrating, prompt=prompt, completions=1, tokens=1)
                for prompt in PROMPTS
            ]
    each_s = max(1e-9, (steps[1] - steps[0]) / ((STEPS[1] - STEPS[0]) * LENGTH))
    load = f"load average {os.getloadavg()[0]:.1f} at the end"
    how = "python -m benchmarks.calibrate: "
    return Calibration(
        machine=f"{os.cpu_count()} CPU cores, {load}; models/arith, one thread each",
        sources={
            "decode_tokens_per_s": f"{how}{DRAWN} tokens each, of one request",
            "prefill_s_per_token": f"{how}first tokens of {PROMPTS[0]} and {PROMPTS[1]}; the slope",
            "load_s": f"{how}the first token of a new version, less one of a version that is there",
            "train_s_per_token": f"{how}steps on {STEPS[0]} and {STEPS[1]} x {LENGTH}; the slope",
            "train_step_s": f"{how}the same, published; the intercept",
            "fused_tokens": "max_batch_tokens of examples/local.yaml",
            "max_running_completions": "assumed: the largest batch measured",
        },
        decode_tokens_per_s=[
            (size, round(size * DRAWN / seconds, 1))
            for size, seconds in zip(SIZES, drawing, strict=True)
        ],
        prefill_s_per_token=round(max(0.0, (long - short) / (PROMPTS[1] - PROMPTS[0])), 6),
        load_s=round(max(0.0, first_tokens - short), 4),
        train_s_per_token=round(each_s, 7),
        train_step_s=round(max(0.0, steps[0] - STEPS[0] * LENGTH * each_s), 4),
        fused_tokens=FUSED_TOKENS,
        max_running_completions=SIZES[-1],
    )


async def _steps(calibrating: Calibrating) -> tuple[Sequence[float], float]:
    """Of a small and a large step; and until the first token of a version that is published."""
    found, first = [], []
    for sequences in STEPS:
        await calibrating.step(sequences)
        times = []
        for _ in range(ROUNDS):
            times.append(await calibrating.step(sequences))
            first.append(await calibrating.draw(prompt=PROMPTS[0], completions=1, tokens=1))
        found.append(median(times))
    return found, median(first)


async def _median(calibrating: Calibrating, *, prompt: int, completions: int, tokens: int) -> float:
    await calibrating.draw(prompt=prompt, completions=completions, tokens=tokens)
    return median(
        [
            await calibrating.draw(prompt=prompt, completions=completions, tokens=tokens)
            for _ in range(ROUNDS)
        ]
    )


def settings() -> dict[str, Any]:
    """Of examples/local.yaml, wherever this is run."""
    config: dict[str, Any] = read_yaml(ROOT / "examples" / "local.yaml")
    for section in (*config["trainers"], *config["samplers"]):
        section["base_model"]["path"] = str(ROOT / "models" / MODEL)
    for model in config["coordinator"]["base_models"]:
        model["tokenizer"] = str(ROOT / "models" / MODEL)
    return config


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parent / "calibration" / "cpu.json"
    parser.add_argument("--out", type=Path, default=default)
    out: Path = parser.parse_args().out
    text = asyncio.run(measure()).model_dump_json(indent=2) + "\n"
    out.write_text(text)
    print(text)  # noqa: T201


if __name__ == "__main__":
    main()
