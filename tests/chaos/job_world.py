"""A mesh that runs jobs, as processes: one coordinator after another on the same peers."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from services.local.mesh import _reserved_port
from services.local.processes import processes
from tests.chaos.world import ROOT, Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from services.local.processes import Processes

PEERS = ("trainer-0", "sampler-0", "sampler-1", "reward")
_QUIET = {"log_level": "INFO"}
_BASE_MODEL = {"name": "arith", "path": str(ROOT / "models" / "arith")}


@dataclass
class JobWorld:
    """The peers of coordinators, all of them SERVING."""

    folder: Path
    peers: dict[str, Service]
    started: Processes

    @contextlib.asynccontextmanager
    async def coordinator(self, name: str, database: str) -> AsyncIterator[Service]:
        """A coordinator that serves at first, on its own database; it may be killed at any time."""
        with _reserved_port() as port:
            config = {
                "state_dir": str(self.folder / name),
                "database": database,
                "blobs": str(self.folder / "blobs"),
                "trainers": [self.peers["trainer-0"].address],
                "samplers": [self.peers["sampler-0"].address, self.peers["sampler-1"].address],
                "reward": self.peers["reward"].address,
                "base_models": [{"name": "arith", "tokenizer": _BASE_MODEL["path"]}],
                "trainer_lease_s": 2.0,
                "rollout_retention_s": 3600.0,
                "drain_s": 0.5,
            }
            service = self._service("coordinator", config, port, log=f"{name}.log")
            await service.start()
            try:
                await service.until_serving()
                yield service
            finally:
                await _end(service)

    def _service(self, name: str, config: dict[str, Any], port: int, log: str) -> Service:
        address = f"127.0.0.1:{port}"
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**config, "listen": address, "telemetry": _QUIET}))
        return Service(name, address, path, self.folder / log, self.started)


@contextlib.asynccontextmanager
async def job_world(folder: Path) -> AsyncIterator[JobWorld]:
    """A trainer, two samplers and a reward service that live on, whatever coordinator dies."""
    sampler = {
        "base_model": _BASE_MODEL,
        # Its engine has nothing to compile or to warm up: it starts in seconds.
        "backend": "transformers",
        "dtype": "float32",
        "max_rank": 8,
        "max_loras": 4,
        "num_threads": 1,
        "drain_s": 0.5,
        "blobs": str(folder / "blobs"),
    }
    configs: dict[str, dict[str, Any]] = {
        "trainer-0": {
            "base_model": _BASE_MODEL,
            "num_threads": 1,
            "blobs": str(folder / "blobs"),
            "drain_s": 0.5,
        },
        "sampler-0": sampler,
        "sampler-1": sampler,
        "reward": {"drain_s": 0.5},
    }
    async with contextlib.AsyncExitStack() as stack:
        started = await stack.enter_async_context(processes())
        world = JobWorld(folder, {}, started)
        for name, config in configs.items():
            port = stack.enter_context(_reserved_port())
            world.peers[name] = world._service(name, config, port, f"{name}.log")
        async with asyncio.TaskGroup() as tasks:
            for service in world.peers.values():
                tasks.create_task(service.start())
        try:
            async with asyncio.TaskGroup() as tasks:
                for service in world.peers.values():
                    tasks.create_task(service.until_serving())
            yield world
        finally:
            async with asyncio.TaskGroup() as tasks:
                for service in world.peers.values():
                    tasks.create_task(_end(service))


async def _end(service: Service) -> None:
    if service.process is not None:
        await service.started.end(service.process, within_s=15.0)
