"""What the journal costs: `python -m benchmarks.trainer` prints it too.

A whole coordinator over gRPC with its store in a file, and a trainer that takes OP_S for everything
and does nothing. Calls of ForwardBackward, which is journaled, and of Forward, which is not, take
turns with the same batch, 16 sequences × 64 tokens, which is what OP_S is about enough for on one
core (benchmarks/trainer.py); the difference of their medians is the journal.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rollmesh import types
from tests.fakes.coordinator import PROJECT, Fakes, running_coordinator
from tests.fakes.mesh import BASE_MODEL, FakeTrainer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

OP_S = 0.1
SEQUENCES, TOKENS = 16, 64
LOSS = types.LossConfig("importance_sampling")


class SlowTrainer(FakeTrainer):
    """Takes OP_S for an op, as a model would."""

    async def forward(
        self,
        adapter: str,
        data: Sequence[types.Datum],
        *,
        temperature: float | None = None,
        loss_config: types.LossConfig | None = None,
    ) -> types.ForwardResult:
        """As FakeTrainer."""
        await asyncio.sleep(OP_S)
        return await super().forward(
            adapter, data, temperature=temperature, loss_config=loss_config
        )

    async def forward_backward(
        self,
        adapter: str,
        sequence: int,
        data: Sequence[types.Datum],
        loss_config: types.LossConfig,
        *,
        epoch: int,
    ) -> types.ForwardBackwardResult:
        """As FakeTrainer."""
        await asyncio.sleep(OP_S)
        return await super().forward_backward(adapter, sequence, data, loss_config, epoch=epoch)


def journal(rounds: int) -> dict[str, float]:
    """Milliseconds of an op with and without it, and `journal_overhead`: the share of OP_S."""
    with tempfile.TemporaryDirectory() as folder:
        journaled, plain = asyncio.run(_measure(Path(folder), rounds))
    with_s, without_s = statistics.median(journaled), statistics.median(plain)
    overhead = (with_s - without_s) / OP_S
    print(f"{'':14}{'ms':>10}{'fastest':>10}{'slowest':>10}")  # noqa: T201
    for name, found in {"journaled": journaled, "not journaled": plain}.items():
        columns = (statistics.median(found), min(found), max(found))
        print(f"{name:14}" + "".join(f"{1000 * each:10.1f}" for each in columns))  # noqa: T201
    print(f"the journal costs {overhead:.1%} of an op of {1000 * OP_S:.0f} ms")  # noqa: T201
    return {
        "journal_overhead": round(overhead, 4),
        "journaled_op_ms": round(1000 * with_s, 2),
        "plain_op_ms": round(1000 * without_s, 2),
    }


async def _measure(folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    adapter = f"{PROJECT}/adapters/measured"
    data = _batch()
    journaled: list[float] = []
    plain: list[float] = []
    async with running_coordinator(folder, Fakes(trainers={"t:1": SlowTrainer()})) as mesh:
        await mesh.until_served()
        await mesh.client.adapters.create(adapter, BASE_MODEL, types.LoraConfig(rank=4))
        training = mesh.client.training
        for sequence in range(1, rounds + 1):
            number = sequence
            journaled.append(
                await _timed(lambda n=number: training.forward_backward(adapter, n, data, LOSS))
            )
            plain.append(await _timed(lambda: training.forward(adapter, data)))
    return journaled[1:], plain[1:]  # The first ones warm up.


async def _timed(call: Callable[[], Awaitable[object]]) -> float:
    start = time.perf_counter()
    await call()
    return time.perf_counter() - start


def _batch() -> list[types.Datum]:
    rng = np.random.default_rng(0)
    return [
        types.Datum(
            rng.integers(0, 100, TOKENS).astype(np.int32),
            rng.integers(0, 100, TOKENS).astype(np.int32),
            np.ones(TOKENS, np.float32),
            rng.uniform(-6, -1, TOKENS).astype(np.float32),
            rng.normal(size=TOKENS).astype(np.float32),
        )
        for _ in range(SEQUENCES)
    ]


if __name__ == "__main__":
    print(json.dumps(journal(rounds=60)))  # noqa: T201
