"""Client of JobService."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from rollmesh import convert
from rollmesh.api.coordinator.v1 import job_service_pb2 as pb
from rollmesh.api.coordinator.v1.job_service_pb2_grpc import JobServiceStub
from rollmesh.rpc.status import mesh_errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from rollmesh.api.coordinator.v1.job_service_pb2_grpc import JobServiceAsyncStub
    from rollmesh.job import Job, JobEvent, JobSpec


class JobClient:
    """JobService, typed. Every method raises the MeshError that the coordinator raised."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: JobServiceAsyncStub = JobServiceStub(channel)

    async def create(
        self, parent: str, spec: JobSpec, job_id: str = "", request_id: str | None = None
    ) -> Job:
        """Store a job. Give a request_id of your own where you repeat the call after a failure."""
        request = pb.CreateJobRequest(
            request_id=request_id or str(uuid.uuid4()),
            parent=parent,
            job_id=job_id,
            spec=convert.spec_to_pb(spec),
        )
        with mesh_errors():
            return convert.job_from_pb((await self._stub.CreateJob(request)).job)

    async def get(self, name: str) -> Job:
        """One job."""
        with mesh_errors():
            return convert.job_from_pb((await self._stub.GetJob(pb.GetJobRequest(name=name))).job)

    async def list(self, parent: str) -> AsyncIterator[Job]:
        """All jobs of a project, newest first."""
        request = pb.ListJobsRequest(parent=parent)
        while True:
            with mesh_errors():
                response = await self._stub.ListJobs(request)
            for message in response.jobs:
                yield convert.job_from_pb(message)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def pause(self, name: str) -> Job:
        """Stop a job after the step it is in."""
        request = pb.PauseJobRequest(name=name)
        with mesh_errors():
            return convert.job_from_pb((await self._stub.PauseJob(request)).job)

    async def resume(self, name: str) -> Job:
        """Go on with a paused job."""
        request = pb.ResumeJobRequest(name=name)
        with mesh_errors():
            return convert.job_from_pb((await self._stub.ResumeJob(request)).job)

    async def cancel(self, name: str) -> Job:
        """End a job now."""
        request = pb.CancelJobRequest(name=name)
        with mesh_errors():
            return convert.job_from_pb((await self._stub.CancelJob(request)).job)

    async def watch(self, name: str, after_event: int = 0) -> AsyncIterator[JobEvent]:
        """The job's events after number `after_event`, up to the one that ends it."""
        request = pb.WatchJobRequest(name=name, after_event=after_event)
        with mesh_errors():
            call = self._stub.WatchJob(request)
            try:
                async for response in call:
                    yield convert.event_from_pb(response.event)
            finally:
                call.cancel()
