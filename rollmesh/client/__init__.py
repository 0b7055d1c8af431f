"""Typed async clients, one per service; `Client` is where a user of the mesh begins.

async with Client("127.0.0.1:7400") as client:
    job = await client.jobs.create("projects/default", load_job_file(Path("job.yaml")))
    async for event in client.jobs.watch(job.name):
        print(event)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from rollmesh.client.adapters import AdapterClient
from rollmesh.client.checkpoints import CheckpointClient
from rollmesh.client.environment import EnvironmentClient, Episode
from rollmesh.client.fleet import FleetClient
from rollmesh.client.futures import FutureClient
from rollmesh.client.health import HealthClient, HealthProbe
from rollmesh.client.jobs import JobClient
from rollmesh.client.keys import KeyClient
from rollmesh.client.records import RecordClient
from rollmesh.client.reward import RewardClient
from rollmesh.client.sampler import SamplerClient
from rollmesh.client.sampling import SamplingClient
from rollmesh.client.sweeps import SweepClient
from rollmesh.client.trainer import TrainerClient
from rollmesh.client.training import TrainingClient
from rollmesh.rpc.channel import channel

if TYPE_CHECKING:
    from types import TracebackType

__all__ = [
    "AdapterClient",
    "CheckpointClient",
    "Client",
    "EnvironmentClient",
    "Episode",
    "FleetClient",
    "FutureClient",
    "HealthClient",
    "HealthProbe",
    "JobClient",
    "KeyClient",
    "RecordClient",
    "RewardClient",
    "SamplerClient",
    "SamplingClient",
    "SweepClient",
    "TrainerClient",
    "TrainingClient",
]


class Client:
    """All that a coordinator offers, over one channel; an async context manager.

    Of several coordinators ("10.0.0.1:7400,10.0.0.2:7400") the one that leads is asked. When
    another takes over, calls fail with Unavailable until it does; then begin watches again.

    Attributes:
        jobs, sweeps, adapters, checkpoints, training, sampling, futures, records, keys, fleet: the
            client of the service of that name.
    """

    def __init__(self, address: str) -> None:
        self._channel = channel(address)
        self.jobs = JobClient(self._channel)
        self.sweeps = SweepClient(self._channel)
        self.adapters = AdapterClient(self._channel)
        self.checkpoints = CheckpointClient(self._channel)
        self.training = TrainingClient(self._channel)
        self.sampling = SamplingClient(self._channel)
        self.records = RecordClient(self._channel)
        self.keys = KeyClient(self._channel)
        self.fleet = FleetClient(self._channel)
        self.futures = FutureClient(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._channel.close()
