"""RecordService over Records."""

# ruff: noqa: N802, ARG002 - gRPC names the methods and says what they take

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rollmesh import convert
from rollmesh.api.coordinator.v1 import record_service_pb2 as pb
from rollmesh.api.coordinator.v1.record_service_pb2_grpc import RecordServiceServicer

if TYPE_CHECKING:
    import grpc

    from services.coordinator.records import Records

    Context = grpc.aio.ServicerContext[Any, Any]


class RecordServicer(RecordServiceServicer):
    """RecordService."""

    def __init__(self, records: Records) -> None:
        self._records = records

    async def PutRecord(
        self, request: pb.PutRecordRequest, context: Context
    ) -> pb.PutRecordResponse:
        """Writes a record."""
        record = await self._records.put(
            request.project,
            request.key,
            request.value,
            expected_revision=convert.optional(request, "expected_revision"),
            ttl_s=convert.optional_duration_from_pb(request, "ttl"),
        )
        return pb.PutRecordResponse(record=convert.record_to_pb(record))

    async def GetRecord(
        self, request: pb.GetRecordRequest, context: Context
    ) -> pb.GetRecordResponse:
        """One record."""
        record = await self._records.get(request.project, request.key)
        return pb.GetRecordResponse(record=convert.record_to_pb(record))

    async def ListRecords(
        self, request: pb.ListRecordsRequest, context: Context
    ) -> pb.ListRecordsResponse:
        """One page of a project's records."""
        records, total_count = await self._records.page(
            request.project,
            request.prefix,
            request.page_size,
            request.offset,
            newest_first=request.newest_first,
        )
        return pb.ListRecordsResponse(
            records=[convert.record_to_pb(record) for record in records], total_count=total_count
        )

    async def DeleteRecord(
        self, request: pb.DeleteRecordRequest, context: Context
    ) -> pb.DeleteRecordResponse:
        """Deletes a record."""
        await self._records.delete(
            request.project,
            request.key,
            expected_revision=convert.optional(request, "expected_revision"),
        )
        return pb.DeleteRecordResponse()
