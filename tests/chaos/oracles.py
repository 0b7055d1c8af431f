"""Real samplers that can be killed, oracle policies, and the coordinator's way to sample them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml

from rollmesh.client import SamplerClient
from rollmesh.rpc.channel import channel
from services.coordinator.fleet.static import StaticFleet
from services.coordinator.sampling import FleetSampling
from services.coordinator.scheduler import Projects, Scheduler
from services.local.mesh import _reserved_port
from services.local.processes import processes
from services.local.sentinel import members
from tests.chaos.world import Service
from tests.fakes.oracle import BASE_MODEL, MAX_LENGTH, OracleTrainer, make_model, oracle_trainer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

SAMPLERS = ("sampler-0", "sampler-1")
MAX_LORAS = 8
MAX_VERSIONS = 24
"""Far fewer than there are policies: they are evicted and pulled again all the time."""


@dataclass
class Oracles:
    """The samplers by name, the trainer that they pull from, and what samples from them."""

    samplers: dict[str, Service]
    trainer: OracleTrainer
    fleet: StaticFleet
    sampling: FleetSampling
    folder: Path

    def files(self, sampler: str) -> list[Path]:
        """The adapters' files that a sampler keeps."""
        return sorted((self.folder / f"{sampler}.cache").glob("*/*/adapter_model.safetensors"))

    def serving(self) -> list[str]:
        """The samplers that serve, as the fleet sees them."""
        addresses = {member.address for member in self.fleet.samplers(BASE_MODEL)}
        return [name for name, service in self.samplers.items() if service.address in addresses]

    @contextlib.contextmanager
    def stalled(self, sampler: str):
        """While the block runs no process of the sampler does anything."""
        with _stopped(members(self.pid(sampler))):
            yield

    @contextlib.contextmanager
    def engine_stalled(self, sampler: str):
        """While the block runs the sampler answers, and its engine's processes do nothing."""
        pid = self.pid(sampler)
        with _stopped([member for member in members(pid) if member != pid]):
            yield

    def pid(self, sampler: str) -> int:
        """Of its main process, which leads their session."""
        process = self.samplers[sampler].process
        assert process is not None
        return process.pid


@contextlib.contextmanager
def _stopped(pids: Iterable[int]):
    pids = list(pids)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextlib.asynccontextmanager
async def oracles(folder: Path, *, samplers: tuple[str, ...] = SAMPLERS) -> AsyncIterator[Oracles]:
    """All of them serving."""
    await asyncio.to_thread(make_model, folder / "model")
    async with contextlib.AsyncExitStack() as stack:
        trainer = await stack.enter_async_context(oracle_trainer())
        started = await stack.enter_async_context(processes())
        services = {}
        for name in samplers:
            address = f"127.0.0.1:{stack.enter_context(_reserved_port())}"
            cache = folder / f"{name}.cache"
            cache.mkdir()
            config = {
                "listen": address,
                "base_model": {"name": BASE_MODEL, "path": str(folder / "model")},
                "backend": "vllm",
                "dtype": "float32",
                "max_length": MAX_LENGTH,
                "max_loras": MAX_LORAS,
                "max_versions": MAX_VERSIONS,
                "max_rank": 8,
                "max_num_seqs": 64,
                "chunk_tokens": 4,
                "quantum_s": 0.25,
                "kv_cache_memory": "64MiB",
                "num_threads": 1,
                "cache_dir": str(cache),
                "drain_s": 0.5,
            }
            path = folder / f"{name}.yaml"
            path.write_text(yaml.safe_dump(config))
            services[name] = Service(name, address, path, folder / f"{name}.log", started)
        async with asyncio.TaskGroup() as tasks:
            for service in services.values():
                tasks.create_task(service.start())
        for service in services.values():
            stack.push_async_callback(_end, service)
        async with asyncio.TaskGroup() as tasks:
            for service in services.values():
                tasks.create_task(service.until_serving())
        ports = {
            service.address: SamplerClient(
                await stack.enter_async_context(channel(service.address))
            )
            for service in services.values()
        }
        fleet = StaticFleet(trainers={}, samplers=ports, rewards={})
        sampling = FleetSampling(
            fleet,
            Scheduler(
                max_running_completions=64,
                max_queued_requests=4096,
                projects=Projects(),
                prompt_token_price=0.25,
            ),
            locate=lambda source: source,
            new_seed=itertools.count(1).__next__,
            clock=time.time,
        )
        polling = asyncio.create_task(fleet.run())
        try:
            while not fleet.samplers(BASE_MODEL):
                await asyncio.sleep(0.05)
            yield Oracles(services, trainer, fleet, sampling, folder)
        finally:
            polling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await polling


async def _end(service: Service) -> None:
    if service.process is not None:
        await service.started.end(service.process, within_s=15.0)
