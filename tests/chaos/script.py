"""What a client of the chaos test does with one adapter: the same ops every time it is run.

An op is repeated, with the same body, until it is answered: what any client does whose call failed
with UNAVAILABLE. Now and then an answered op is sent once more.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from rollmesh import types
from rollmesh.errors import DeadlineExceeded, Overloaded, Unavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rollmesh.client import Client
    from tests.chaos.test_exactly_once import Storm

Result = TypeVar("Result")

BASE_MODEL = "arith"
VOCAB_SIZE = 104
LORAS = (
    types.LoraConfig(rank=4, seed=1),
    types.LoraConfig(rank=16, alpha=8.0, target_modules=("q_proj", "v_proj"), seed=2),
    types.LoraConfig(rank=7, target_modules=("gate_proj", "up_proj", "down_proj"), seed=3),
)
LOSSES = (
    types.LossConfig("importance_sampling", kl_coefficient=0.01),
    types.LossConfig("cross_entropy"),
    types.LossConfig("ppo"),
)
_OF_TIMES = frozenset({"queued_s", "run_s"})


@dataclass
class Trace:
    """What came of each op, in order."""

    results: list[str] = field(default_factory=list)


async def insist(call: Callable[[], Awaitable[Result]]) -> Result:
    """The answer, however often it takes."""
    async with asyncio.timeout(180):
        while True:
            try:
                return await call()
            except (Unavailable, DeadlineExceeded, Overloaded):
                await asyncio.sleep(0.05)


def batch(script: int, number: int, *, sampled: bool) -> list[types.Datum]:
    """Some random sequences of several lengths, the same for the same arguments."""
    rng = np.random.default_rng([script, number])
    data = []
    for _ in range(int(rng.integers(2, 6))):
        length = int(rng.integers(3, 70))
        tokens = rng.integers(0, VOCAB_SIZE, length + 1).astype(np.int32)
        data.append(
            types.Datum(
                token_ids=tokens[:-1],
                target_token_ids=tokens[1:],
                weights=rng.integers(0, 2, length).astype(np.float32),
                sampling_logprobs=rng.uniform(-6, -1, length).astype(np.float32)
                if sampled
                else None,
                advantages=rng.normal(size=length).astype(np.float32) if sampled else None,
            )
        )
    return data


async def train(
    client: Client, adapter: str, script: int, steps: int, trace: Trace, storm: Storm | None
) -> str:
    """Train `adapter` for `steps` steps; the digest of its weights after the last.

    `storm` says when the next op may begin, and hears of each that was answered.
    """
    training, loss = client.training, LOSSES[script]
    await insist(lambda: client.adapters.create(adapter, BASE_MODEL, LORAS[script], adapter[-8:]))
    checkpoint = f"{adapter}/checkpoints/third"
    sequence = version = 0

    async def op(call: Callable[[int], Awaitable[Result]]) -> Result:
        nonlocal sequence
        if storm:
            await storm.turn(adapter)
        sequence += 1
        mine = sequence
        result = await insist(lambda: call(mine))
        trace.results.append(told(result))
        if storm:
            await storm.answered(adapter)
        if mine % 5 == 0:
            again = await insist(lambda: call(mine))
            assert told(again) == told(result), "an op that was sent twice has two results"
        return result

    for step in range(steps):
        for part in range(1 + (step + script) % 2):
            data = batch(script, 2 * step + part, sampled=loss.loss != "cross_entropy")
            await op(lambda n, data=data: training.forward_backward(adapter, n, data, loss))
        await publish_early(client, adapter, trace, wanted=step % 3 == script)
        adam = types.AdamConfig(1e-3 * (1 + step % 3), max_grad_norm=1.0, weight_decay=0.01)
        stepped = await op(lambda n, adam=adam: training.optim_step(adapter, n, adam))
        version += 1
        assert stepped.policy_version == version
        if step == steps // 3:
            await insist(lambda: client.checkpoints.create(checkpoint, f"{adapter[-8:]}-third"))
        if step == 2 * steps // 3 and script == 0:
            await op(
                lambda n: training.load_checkpoint(adapter, n, checkpoint, with_optimizer=True)
            )
            version += 1
        if step % 4 == script:
            published = await insist(lambda: client.adapters.publish(adapter))
            trace.results.append(f"published {published.policy_version} {published.digest}")
    found = await insist(lambda: client.adapters.get(adapter))
    assert (found.policy_version, found.next_sequence) == (version, sequence + 1)
    return (await insist(lambda: client.adapters.publish(adapter))).digest


async def publish_early(client: Client, adapter: str, trace: Trace, *, wanted: bool) -> None:
    """Publish where it is wanted, while gradients are pending."""
    if wanted:
        call = partial(client.adapters.publish, adapter, with_pending_gradients=True)
        published = await insist(call)
        trace.results.append(f"published {published.policy_version} {published.digest}")


def told(result: object) -> str:
    """A result, without its times: every bit of what was computed."""
    if isinstance(result, types.ForwardBackwardResult):
        sha = hashlib.sha256()
        for logprobs in result.logprobs:
            sha.update(logprobs.tobytes())
        metrics = {k: v.hex() for k, v in sorted(result.metrics.items()) if k not in _OF_TIMES}
        return f"forward_backward {sha.hexdigest()} {metrics}"
    if isinstance(result, types.OptimStepResult):
        metrics = {k: v.hex() for k, v in sorted(result.metrics.items()) if k not in _OF_TIMES}
        return f"optim_step {result.policy_version} {metrics}"
    return repr(result)
