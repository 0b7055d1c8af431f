"""Client of RecordService."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh import convert
from rollmesh.api.coordinator.v1 import record_service_pb2 as pb
from rollmesh.api.coordinator.v1.record_service_pb2_grpc import RecordServiceStub
from rollmesh.rpc.status import mesh_errors

if TYPE_CHECKING:
    import grpc

    from rollmesh import types
    from rollmesh.api.coordinator.v1.record_service_pb2_grpc import RecordServiceAsyncStub


class RecordClient:
    """RecordService, typed. Every method raises the MeshError that the coordinator raised.

    `project` is a resource name, projects/{p}.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: RecordServiceAsyncStub = RecordServiceStub(channel)

    async def put(
        self,
        project: str,
        key: str,
        value: bytes,
        *,
        expected_revision: int | None = None,
        ttl_s: float | None = None,
    ) -> types.Record:
        """Write a record, which is kept for `ttl_s` seconds (None: until it is deleted).

        `expected_revision`: the one that it replaces (0: there is none yet; None: whichever).

        Raises:
            Conflict: it has another revision. Also where the call was repeated, as it is when a
                connection breaks, and the first has come through: read it again.
        """
        request = pb.PutRecordRequest(
            project=project,
            key=key,
            value=value,
            expected_revision=expected_revision,
            ttl=None if ttl_s is None else convert.duration_to_pb(ttl_s),
        )
        with mesh_errors():
            return convert.record_from_pb((await self._stub.PutRecord(request)).record)

    async def get(self, project: str, key: str) -> types.Record:
        """One record. NotFound: there is none, or it has expired."""
        request = pb.GetRecordRequest(project=project, key=key)
        with mesh_errors():
            return convert.record_from_pb((await self._stub.GetRecord(request)).record)

    async def list(
        self,
        project: str,
        prefix: str = "",
        *,
        page_size: int = 100,
        offset: int = 0,
        newest_first: bool = False,
    ) -> tuple[list[types.Record], int]:
        """One page of the records whose keys begin with `prefix`, and how many there are in all.

        By key, or the newest first. A page ends early at 16 MiB: go on at `offset` and its length.
        """
        request = pb.ListRecordsRequest(
            project=project,
            prefix=prefix,
            page_size=page_size,
            offset=offset,
            newest_first=newest_first,
        )
        with mesh_errors():
            response = await self._stub.ListRecords(request)
        return [convert.record_from_pb(each) for each in response.records], response.total_count

    async def delete(self, project: str, key: str, *, expected_revision: int | None = None) -> None:
        """Delete a record; one that is gone is fine. Conflict: it has another revision."""
        request = pb.DeleteRecordRequest(
            project=project, key=key, expected_revision=expected_revision
        )
        with mesh_errors():
            await self._stub.DeleteRecord(request)
