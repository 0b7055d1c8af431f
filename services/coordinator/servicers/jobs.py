"""JobService over Jobs."""

# ruff: noqa: N802, ARG002 - gRPC names the methods and says what they take

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from rollmesh import convert
from rollmesh.api.coordinator.v1 import job_service_pb2 as pb
from rollmesh.api.coordinator.v1.job_service_pb2_grpc import JobServiceServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from services.coordinator.jobs import Jobs

    Context = grpc.aio.ServicerContext[Any, Any]


class JobServicer(JobServiceServicer):
    """JobService."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    async def CreateJob(
        self, request: pb.CreateJobRequest, context: Context
    ) -> pb.CreateJobResponse:
        """Stores a job."""
        # A dataset of many thousand tasks takes seconds, which all other calls would wait for.
        spec = await asyncio.to_thread(convert.spec_from_pb, request.spec)
        job = await self._jobs.create(
            request.parent, request.job_id, spec, request_id=request.request_id
        )
        return pb.CreateJobResponse(job=convert.job_to_pb(job))

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        """One job."""
        return pb.GetJobResponse(job=convert.job_to_pb(await self._jobs.get(request.name)))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        """One page of a project's jobs."""
        jobs, token = await self._jobs.page(request.parent, request.page_size, request.page_token)
        return pb.ListJobsResponse(
            jobs=[convert.job_to_pb(job) for job in jobs], next_page_token=token
        )

    async def PauseJob(self, request: pb.PauseJobRequest, context: Context) -> pb.PauseJobResponse:
        """Stops a job after its step."""
        return pb.PauseJobResponse(job=convert.job_to_pb(await self._jobs.pause(request.name)))

    async def ResumeJob(
        self, request: pb.ResumeJobRequest, context: Context
    ) -> pb.ResumeJobResponse:
        """Goes on with a paused job."""
        return pb.ResumeJobResponse(job=convert.job_to_pb(await self._jobs.resume(request.name)))

    async def CancelJob(
        self, request: pb.CancelJobRequest, context: Context
    ) -> pb.CancelJobResponse:
        """Ends a job."""
        return pb.CancelJobResponse(job=convert.job_to_pb(await self._jobs.cancel(request.name)))

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: Context
    ) -> AsyncIterator[pb.WatchJobResponse]:
        """Streams a job's events."""
        async for event in self._jobs.watch(request.name, request.after_event):
            yield pb.WatchJobResponse(event=convert.event_to_pb(event))
