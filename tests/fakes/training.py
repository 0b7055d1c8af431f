"""The coordinator's training side, without gRPC and jobs, on fake trainers; it can die anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import secrets
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rollmesh import types
from rollmesh.convert import journal as codec
from services.coordinator.adapters import Adapters, Durability
from services.coordinator.base_models import BaseModels
from services.coordinator.fleet.static import StaticFleet
from services.coordinator.journal import Journal
from services.coordinator.newest import Publications
from tests.fakes.fleet import until
from tests.fakes.mesh import BASE_MODEL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from rollmesh.blobs import Blobs
    from services.coordinator.store import Store
    from tests.fakes.mesh import FakeTrainer


DATUM = types.Datum(np.array([1, 2], np.int32), np.array([2, 3], np.int32))
LOSS = types.LossConfig("cross_entropy")
ADAM = types.AdamConfig(learning_rate=0.1)


class Life:
    """Of a process: it ends at step `dies_at`, after which nothing in it goes on."""

    def __init__(self, dies_at: float = float("inf")) -> None:
        self.dies_at = dies_at
        self.num_steps = 0
        self.dead = asyncio.Event()

    async def step(self) -> None:
        self.num_steps += 1
        if self.num_steps >= self.dies_at:
            self.dead.set()
            await asyncio.Event().wait()


READING = {
    "all",
    "find",
    "get",
    "get_adapter",
    "get_trainer",
    "since",
    "tail",
    "tails",
}


class Mortal:
    """`target`, where a call that changes it is two steps of `life`: there and back."""

    def __init__(self, target: Any, life: Life) -> None:
        self._target = target
        self._life = life

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)
        if not inspect.iscoroutinefunction(method) or name in READING:
            return method

        async def call(*args: Any, **named: Any) -> Any:
            await self._life.step()
            result = await method(*args, **named)
            await self._life.step()
            return result

        return call


class NoSamplers:
    async def unload(self, base_model: str, adapter: str, policy_version: int | None) -> None:
        pass


class Core(Adapters):
    """One that runs, its fleet, and what hears of its publications."""

    fleet: StaticFleet
    publications: Publications


@contextlib.asynccontextmanager
async def running_core(
    store: Store,
    blobs: Blobs,
    trainers: Mapping[str, FakeTrainer],
    life: Life | None = None,
    **durability: Any,
) -> AsyncIterator[Core]:
    """A core whose trainers have all been heard of; it dies with the block, or by `life` before."""
    life = life or Life()
    settings = Durability(**{**DURABILITY, **durability})
    ports: Any = {address: Mortal(trainer, life) for address, trainer in trainers.items()}
    fleet = StaticFleet(trainers=ports, samplers={}, rewards={})
    mortal: Any = replace(
        store,
        adapters=Mortal(store.adapters, life),  # type: ignore[arg-type]
        versions=Mortal(store.versions, life),  # type: ignore[arg-type]
        ops=Mortal(store.ops, life),  # type: ignore[arg-type]
    )
    journal = Journal(
        mortal.ops, blobs, codec, clock=time.time, new_id=lambda: secrets.token_hex(16)
    )
    publications = Publications()
    core = Core(
        mortal,
        journal,
        fleet,
        ports,
        NoSamplers(),  # type: ignore[arg-type]
        base_models=BaseModels(fleet, [BASE_MODEL]),
        publications=publications,
        blobs=blobs,
        durability=settings,
        max_adapters=lambda project: None,
        clock=time.time,
    )
    core.fleet = fleet
    core.publications = publications
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(part.run()) for part in (fleet, core)]
        await until(
            fleet,
            lambda: all(
                member.serving for member in fleet.all_trainers() if not trainers_away(trainers)
            ),
        )
        try:
            yield core
        finally:
            for task in running:
                task.cancel()


def trainers_away(trainers: Mapping[str, FakeTrainer]) -> bool:
    return any(trainer.away for trainer in trainers.values())


DURABILITY = {
    "trainer_lease_s": 1000.0,
    "snapshot_every_ops": 1000,
    "snapshot_every_bytes": 2**30,
    "result_retention_s": 1000.0,
}
