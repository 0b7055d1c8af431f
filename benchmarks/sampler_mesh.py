"""A real mesh on this machine, and what benchmarks/sampler.py does with it as a client."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.sampler_model import RANK, VOCABULARY
from rollmesh.client import Client
from rollmesh.names import checkpoint_name
from rollmesh.types import AdamConfig, Datum, LoraConfig, LossConfig, PolicyRef, SamplingParams
from services.local.config import LocalConfig
from services.local.mesh import mesh

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from benchmarks.sampler_raw import Work
    from services.local.mesh import Mesh

MODEL = "bench"
VERSIONS_PER_S = 10
MAX_DRAWS = 32
"""Of the tenant that makes versions, that have not ended; beyond them it makes them more slowly."""
STREAM_TOKENS = 400
"""Of the streams in whose middle a sampler is killed."""


class Tenant:
    """An adapter of a project of its own, at its newest published version."""

    def __init__(self, client: Client, project: str) -> None:
        self._client = client
        self.project = f"projects/{project}"
        self.name = f"projects/{project}/adapters/a"
        self.policy = PolicyRef(MODEL, self.name, 0)
        self._sequence = 1
        self.checkpoints: list[str] = []
        self._num_made = 0
        self._num_published = 0
        self._num_drawn = 0

    def counts(self) -> dict[str, int]:
        """Versions made and published, and tokens drawn, until now."""
        return {
            "made": self._num_made,
            "published": self._num_published,
            "drawn": self._num_drawn,
        }

    async def create(self) -> None:
        """The adapter, trained a little, with its first version published."""
        await self._client.adapters.create(self.name, MODEL, LoraConfig(rank=RANK))
        await self.step()
        await self.publish()

    async def go_on(self) -> None:
        """After a cancelled call: it may have been journaled, and its sequence used up."""
        self._sequence = (await self._client.adapters.get(self.name)).next_sequence

    async def step(self) -> None:
        """Train one step on a few tokens."""
        tokens = np.arange(5, dtype=np.int32)
        datum = Datum(tokens[:-1], tokens[1:], np.ones(4, np.float32), None, None)
        training = self._client.training
        await training.forward_backward(
            self.name, self._sequence, [datum], LossConfig("cross_entropy")
        )
        await training.optim_step(self.name, self._sequence + 1, AdamConfig(learning_rate=1e-4))
        self._sequence += 2

    async def keep(self) -> None:
        """Two checkpoints of different weights, for `load`."""
        for count in range(2):
            await self.step()
            name = checkpoint_name(self.name, f"kept-{count}")
            await self._client.checkpoints.create(name)
            self.checkpoints.append(name)

    async def load(self) -> None:
        """A new version without the price of a step: the weights of the other checkpoint."""
        checkpoint = self.checkpoints[self._sequence % 2]
        await self._client.training.load_checkpoint(
            self.name, self._sequence, checkpoint, with_optimizer=False
        )
        self._sequence += 1
        self._num_made += 1

    async def publish(self) -> None:
        """What is sampled from now on is the newest step's."""
        published = await self._client.adapters.publish(self.name)
        self._num_published += 1
        self.policy = PolicyRef(MODEL, self.name, published.policy_version)

    async def first_token(self) -> None:
        """Return when a token of the version that was published last has arrived."""
        await self._client.sampling.sample(
            self.project, self.policy, [5, 6, 7], 1, SamplingParams(max_tokens=1)
        )
        self._num_drawn += 1


class BenchMesh:
    """A mesh with its client and tenants that have adapters."""

    def __init__(self, running: Mesh, client: Client) -> None:
        self.running = running
        self.client = client
        self.tenants: list[Tenant] = []
        self.versions_per_s: dict[str, list[float]] = {}
        """What was reached of VERSIONS_PER_S on both sides, in each round."""

    async def more_tenants(self, count: int) -> None:
        """Until there are `count`."""
        for index in range(len(self.tenants), count):
            tenant = Tenant(self.client, f"tenant-{index}")
            await tenant.create()
            self.tenants.append(tenant)

    async def run(self, work: Work, tenants: Sequence[Tenant] = ()) -> float:
        """Tokens/s of the same requests as a raw engine's, from the tenants' adapters in turns."""
        params = SamplingParams(max_tokens=work.max_tokens, temperature=1.0, ignore_eos=True)
        begin = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for index, prompt in enumerate(work.prompts):
                tenant = tenants[index % len(tenants)] if tenants else None
                project = (tenant or self.tenants[0]).project
                policy = tenant.policy if tenant else PolicyRef(MODEL)
                tasks.create_task(
                    self.client.sampling.sample(
                        project, policy, prompt, work.num_completions, params
                    )
                )
        return work.num_tokens / (time.perf_counter() - begin)

    async def run_beside(self, work: Work, own: Sequence[Tenant], *, publishing: bool) -> float:
        """`run`, while the last tenant makes 10 versions a second and draws a token after each.

        With `publishing` each is published, and the token is of it; else all are of one version.
        """
        other = self.tenants[-1]
        if not other.checkpoints:
            await other.keep()
        await other.go_on()
        before, begin = other.counts(), time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            beside = tasks.create_task(_versions_of(other, publishing=publishing))
            speed = await self.run(work, own)
            beside.cancel()
        seconds = time.perf_counter() - begin
        rates = {key: (count - before[key]) / seconds for key, count in other.counts().items()}
        for key, rate in rates.items():
            what = f"{key}, {'publishing' if publishing else 'not publishing'}"
            self.versions_per_s.setdefault(what, []).append(rate)
        return speed

    async def publish_to_token_ms(self, count: int) -> list[float]:
        """From the call of PublishAdapter to the arrival of the new version's first token."""
        tenant = self.tenants[-1]
        await tenant.go_on()
        found = []
        for _ in range(count):
            await tenant.step()
            begin = time.perf_counter()
            await tenant.publish()
            await tenant.first_token()
            found.append((time.perf_counter() - begin) * 1000)
        return found

    async def failover_s(self, victim: str, prompts: Sequence[Sequence[int]]) -> float:
        """From the death of a sampler to the next tokens of the streams that it had, by another.

        The median over these streams.
        """
        killed = asyncio.Event()
        begun = asyncio.Barrier(len(prompts) + 1)
        async with asyncio.TaskGroup() as tasks:
            streams = [
                tasks.create_task(self._survivor(index, prompt, begun, killed))
                for index, prompt in enumerate(prompts)
            ]
            await begun.wait()
            self.running.kill(victim)
            died = time.perf_counter()
            killed.set()
        gaps = [moved - died for stream in streams if (moved := stream.result()) is not None]
        return statistics.median(gaps)

    async def _survivor(
        self, index: int, prompt: Sequence[int], begun: asyncio.Barrier, killed: asyncio.Event
    ) -> float | None:
        """When a stream's first tokens by another sampler came; None: it kept its sampler."""
        tenant = self.tenants[index % len(self.tenants)]
        params = SamplingParams(max_tokens=STREAM_TOKENS, temperature=1.0, ignore_eos=True)
        stream = self.client.sampling.stream(tenant.project, tenant.policy, prompt, 1, params)
        first, moved = None, None
        async for chunk in stream:
            for span in chunk.spans:
                if first is None:
                    first = span.sampler
                    await begun.wait()
                    await killed.wait()
                elif moved is None and span.sampler != first:
                    moved = time.perf_counter()
        return moved


async def _versions_of(tenant: Tenant, *, publishing: bool) -> None:
    # A draw may wait in a full sampler's line: the next publish doesn't wait for it.
    waiting = asyncio.Semaphore(MAX_DRAWS)
    begin = time.perf_counter()
    async with asyncio.TaskGroup() as draws:
        for count in range(1, 1_000_000):
            await tenant.load()
            if publishing:
                await tenant.publish()
            await waiting.acquire()
            draw = draws.create_task(tenant.first_token())
            draw.add_done_callback(lambda _: waiting.release())
            await asyncio.sleep(begin + count / VERSIONS_PER_S - time.perf_counter())


@contextlib.asynccontextmanager
async def bench_mesh(
    model: Path, sampler: dict[str, Any], num_samplers: int
) -> AsyncIterator[BenchMesh]:
    """Coordinator, trainer and samplers with these settings, in processes of their own."""
    base_model = {"name": MODEL, "path": str(model)}
    config = LocalConfig.model_validate(
        {
            "coordinator": {
                "base_models": [{"name": MODEL, "tokenizer": str(model)}],
                # All that is asked for at once: the sampler has as many of each adapter to choose
                # from as fill its batch, whatever adapters are in its slots; and draws of a tenant
                # that publishes wait for nothing but the sampler.
                "max_running_completions": 1024,
            },
            "trainers": [{"base_model": base_model, "num_threads": 1, "max_rank": RANK}],
            "samplers": [{**sampler, "base_model": base_model}] * num_samplers,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        async with mesh(config, Path(folder)) as running, Client(running.address) as client:
            yield BenchMesh(running, client)


def random_prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Of words that are nobody's end of sequence."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, VOCABULARY, length).tolist() for _ in range(count)]
