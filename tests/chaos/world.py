"""A coordinator and trainers as processes that can be killed at any moment and come back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from services.local.mesh import _reserved_port
from services.local.probes import until_serving
from services.local.processes import processes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.local.processes import Processes

ROOT = Path(__file__).resolve().parents[2]
START_S = 300.0
TRAINERS = ("trainer-0", "trainer-1")


@dataclass
class Service:
    """One process; the next one has the same address and the same configuration."""

    name: str
    address: str
    config: Path
    log: Path
    started: Processes
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it; `until_serving` says when it is there."""
        program = self.name.partition("-")[0]
        self.process = await self.started.start(
            (sys.executable, "-m", f"services.{program}", "--config", str(self.config)),
            log=self.log,
            environment={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    async def until_serving(self) -> None:
        """Return once it is SERVING."""
        async with asyncio.timeout(START_S):
            await until_serving(self.address)

    async def kill_and_restart(self) -> None:
        """SIGKILL, which nothing can prepare for, and a new process as soon as it is dead."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        await self.process.wait()
        await self.start()


@dataclass
class World:
    """The services by name: coordinator, trainer-0, trainer-1."""

    services: dict[str, Service]

    @property
    def address(self) -> str:
        """Of the coordinator."""
        return self.services["coordinator"].address


@contextlib.asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    """All of them SERVING. Samplers and rewards are named, and never there."""
    with contextlib.ExitStack() as stack:
        names = ("coordinator", *TRAINERS, "nobody")
        addresses = {name: f"127.0.0.1:{stack.enter_context(_reserved_port())}" for name in names}
        quiet = {"log_level": "INFO"}
        trainer = {
            "base_model": {"name": "arith", "path": str(ROOT / "models" / "arith")},
            "num_threads": 1,
            "blobs": str(folder / "blobs"),
            "drain_s": 0.5,
            "telemetry": quiet,
        }
        configs: dict[str, dict[str, Any]] = {
            "coordinator": {
                "state_dir": str(folder),
                "blobs": str(folder / "blobs"),
                "trainers": [addresses[name] for name in TRAINERS],
                "samplers": [addresses["nobody"]],
                "reward": addresses["nobody"],
                "trainer_lease_s": 2.0,
                "snapshot_every_ops": 7,
                "drain_s": 0.5,
                "telemetry": quiet,
            },
            **dict.fromkeys(TRAINERS, trainer),
        }
        async with processes() as started:
            services = {}
            for name, config in configs.items():
                path = folder / f"{name}.yaml"
                path.write_text(yaml.safe_dump({**config, "listen": addresses[name]}))
                services[name] = Service(
                    name, addresses[name], path, folder / f"{name}.log", started
                )
            async with asyncio.TaskGroup() as tasks:
                for service in services.values():
                    tasks.create_task(service.start())
            async with asyncio.TaskGroup() as tasks:
                for service in services.values():
                    tasks.create_task(service.until_serving())
            try:
                yield World(services)
            finally:
                async with asyncio.TaskGroup() as tasks:
                    for service in services.values():
                        if service.process is not None:
                            tasks.create_task(started.end(service.process, within_s=15.0))
