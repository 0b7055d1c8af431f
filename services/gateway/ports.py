"""What the gateway's cores need of the coordinator; `rollmesh.client` has it, and tests a fake.

Every method raises the MeshError that the coordinator raised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from rollmesh import types
    from rollmesh.api.coordinator.v1 import future_service_pb2 as pb
    from rollmesh.client import Client


class Futures(Protocol):
    """FutureService."""

    async def create(
        self, name: str, work: pb.Work, *, queue: str = "", position: int = 0, group: str = ""
    ) -> pb.Future: ...
    async def wait(self, name: str, timeout_s: float | None = None) -> pb.Future: ...
    async def wait_many(
        self, project: str, group: str, after: int = 0, timeout_s: float | None = None
    ) -> tuple[list[tuple[str, bool]], int]: ...
    async def cancel(self, name: str) -> None: ...


class Records(Protocol):
    """RecordService."""

    async def put(
        self,
        project: str,
        key: str,
        value: bytes,
        *,
        expected_revision: int | None = None,
        ttl_s: float | None = None,
    ) -> types.Record: ...
    async def get(self, project: str, key: str) -> types.Record: ...
    async def list(
        self,
        project: str,
        prefix: str = "",
        *,
        page_size: int = 100,
        offset: int = 0,
        newest_first: bool = False,
    ) -> tuple[list[types.Record], int]: ...
    async def delete(
        self, project: str, key: str, *, expected_revision: int | None = None
    ) -> None: ...


class Keys(Protocol):
    """KeyService."""

    async def find(self, secret: str) -> types.Key: ...
    async def list(self, project: str) -> list[types.Key]: ...
    async def delete(self, name: str) -> None: ...


class Adapters(Protocol):
    """AdapterService."""

    async def fork(
        self,
        name: str,
        checkpoint: str,
        request_id: str | None = None,
        *,
        with_optimizer: bool = False,
        idle_ttl_s: float | None = None,
    ) -> types.Adapter: ...
    async def publish(self, name: str) -> types.PublishedVersion: ...
    async def keep_idle(self, name: str, idle_ttl_s: float | None) -> None: ...
    async def delete(self, name: str, request_id: str | None = None) -> None: ...


class Checkpoints(Protocol):
    """CheckpointService."""

    async def create(
        self, name: str, request_id: str | None = None, *, ttl_s: float | None = None
    ) -> types.Checkpoint: ...
    async def get(self, name: str) -> types.Checkpoint: ...
    def list(self, parent: str) -> AsyncIterator[types.Checkpoint]: ...
    async def delete(self, name: str, request_id: str | None = None) -> None: ...
    def export(self, name: str) -> AsyncGenerator[types.AdapterExport | bytes | str]: ...


class Leases(Protocol):
    """SamplingService's leases."""

    async def create_lease(
        self,
        project: str,
        policy: types.PolicyRef,
        *,
        ttl_s: float | None = None,
        request_id: str = "",
    ) -> types.Lease: ...
    async def renew_lease(self, name: str, *, ttl_s: float | None = None) -> types.Lease: ...
    async def delete_lease(self, name: str) -> None: ...


class Members(Protocol):
    """FleetService."""

    async def get(self) -> types.Fleet: ...


@dataclass(frozen=True, slots=True)
class Mesh:
    """The coordinator; `Mesh.of` a client of it."""

    futures: Futures
    records: Records
    keys: Keys
    adapters: Adapters
    checkpoints: Checkpoints
    leases: Leases
    fleet: Members

    @classmethod
    def of(cls, client: Client) -> Self:
        """What `client` calls."""
        return cls(
            futures=client.futures,
            records=client.records,
            keys=client.keys,
            adapters=client.adapters,
            checkpoints=client.checkpoints,
            leases=client.sampling,
            fleet=client.fleet,
        )
