"""What a server raises is what its client raises; how every server begins and ends."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from rollmesh import convert
from rollmesh.api.coordinator.v1 import job_service_pb2 as pb
from rollmesh.api.coordinator.v1.job_service_pb2_grpc import (
    JobServiceServicer,
    JobServiceStub,
    add_JobServiceServicer_to_server,
)
from rollmesh.client import JobClient
from rollmesh.errors import (
    BY_REASON,
    AlreadyExists,
    CapacityExhausted,
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    MeshError,
    NotFound,
    Overloaded,
    QuotaExceeded,
    Unavailable,
    Unimplemented,
)
from rollmesh.job import JobEvent, Warned
from rollmesh.rpc.channel import MAX_MESSAGE_BYTES, channel
from rollmesh.rpc.server import serving
from rollmesh.rpc.status import mesh_errors, to_error

SERVICE = "rollmesh.api.coordinator.v1.JobService"
CONTEXT = {"field": "rank", "value": "0", "allowed": "1 to 64", "text": "ü\n\0 %"}
EVENT = pb.WatchJobResponse(
    event=convert.event_to_pb(JobEvent(number=1, time=0, event=Warned(reason="R", message="m")))
)
HIDDEN = "the password is hunter2"


class Jobs(JobServiceServicer):
    """Raises what `failure` is; without one, answers when `release` is set."""

    def __init__(self):
        self.failure: Exception | None = None
        self.bare: grpc.StatusCode | None = None  # A status without our details.
        self.started = asyncio.Event()
        self.release = asyncio.Event()
        self.left = asyncio.Event()

    async def GetJob(self, request, context):
        if self.bare is not None:
            await context.abort(self.bare, "as a proxy would")
        return await self._answer(pb.GetJobResponse())

    async def WatchJob(self, request, context):
        yield EVENT
        yield await self._answer(EVENT)

    async def _answer(self, response):
        if self.failure is not None:
            raise self.failure
        self.started.set()
        try:
            await self.release.wait()
        finally:
            self.left.set()
        return response


@pytest.fixture
def jobs():
    return Jobs()


def serve(jobs, drain_s=0.0):
    return serving(
        lambda server: add_JobServiceServicer_to_server(jobs, server),
        services=[SERVICE],
        drain_s=drain_s,
    )


@pytest.fixture
async def opened(jobs):
    async with serve(jobs) as running, channel(f"127.0.0.1:{running.port}") as opened:
        await running.ready()
        yield opened


async def unary(opened) -> None:
    await JobClient(opened).get("projects/p/jobs/j")


async def streamed(opened) -> None:
    events = [event async for event in JobClient(opened).watch("projects/p/jobs/j")]
    raise AssertionError(events)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [unary, streamed])
@pytest.mark.parametrize("reason", BY_REASON)
async def test_every_error_arrives_as_the_class_that_was_raised(jobs, opened, reason, call):
    jobs.failure = BY_REASON[reason]("why it fails: größer", **CONTEXT)
    with pytest.raises(MeshError) as caught:
        await call(opened)
    assert type(caught.value) is BY_REASON[reason]
    assert str(caught.value) == "why it fails: größer"
    assert caught.value.context == CONTEXT


async def test_what_a_stream_sent_before_it_failed_has_arrived(jobs, opened):
    jobs.failure = Overloaded("full")
    events = JobClient(opened).watch("projects/p/jobs/j")
    assert (await anext(events)).number == 1
    with pytest.raises(Overloaded):
        await anext(events)


async def test_when_to_try_again_arrives_as_the_one_who_raised_it_said(jobs, opened):
    jobs.failure = Overloaded("full")
    jobs.failure.retry_after_s = 2.75
    with pytest.raises(Overloaded) as caught:
        await JobClient(opened).get("projects/p/jobs/j")
    assert caught.value.retry_after_s == 2.75
    assert Overloaded.retry_after_s == 1.0


def details(error: grpc.aio.AioRpcError) -> dict[str, object]:
    found = {}
    for detail in rpc_status.from_call(error).details:
        for kind in (ErrorInfo, RetryInfo, BadRequest, QuotaFailure):
            message = kind()
            if detail.Unpack(message):
                found[kind.__name__] = message
    return found


@pytest.mark.parametrize("reason", BY_REASON)
async def test_the_status_on_the_wire_is_for_clients_in_any_language(jobs, opened, reason):
    error = jobs.failure = BY_REASON[reason]("why", field="rank")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await JobServiceStub(opened).GetJob(pb.GetJobRequest())
    assert caught.value.code().name == error.status
    assert caught.value.details() == "why"
    found = details(caught.value)
    assert (found["ErrorInfo"].reason, found["ErrorInfo"].domain) == (reason, "rollmesh")
    assert ("RetryInfo" in found) is bool(error.retry_after_s)
    if error.retry_after_s:
        assert found["RetryInfo"].retry_delay.ToNanoseconds() == error.retry_after_s * 1e9
    assert ("BadRequest" in found) is (error.status == "INVALID_ARGUMENT")
    assert ("QuotaFailure" in found) is (reason == "QUOTA_EXCEEDED")


async def test_a_quota_that_is_used_up_names_whose_it_is_and_its_numbers(jobs, opened):
    context = {"project": "p", "quota": "adapters", "value": "3", "allowed": "3"}
    jobs.failure = QuotaExceeded("project 'p' has 3 adapters, which is the most", **context)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await JobServiceStub(opened).GetJob(pb.GetJobRequest())
    found = details(caught.value)
    (violation,) = found["QuotaFailure"].violations
    assert violation.subject == "projects/p"
    assert violation.description == "project 'p' has 3 adapters, which is the most"
    assert found["RetryInfo"].retry_delay.ToNanoseconds() == 1e9
    with pytest.raises(QuotaExceeded) as raised:
        await unary(opened)
    assert raised.value.context == context


@pytest.mark.parametrize("letter", ["x", "ü", "✓", "🙂"])
async def test_an_error_about_something_huge_arrives_shortened(jobs, opened, letter):
    huge = letter * 1_000_000
    jobs.failure = InvalidRequest(f"start {huge}", field=huge, value=huge, allowed=huge, more=huge)
    with pytest.raises(InvalidRequest, match=f"^start {letter}+…$") as caught:
        await unary(opened)
    assert caught.value.context.keys() == {"field", "value", "allowed", "more"}
    assert all(value.endswith(f"{letter}…") for value in caught.value.context.values())


@pytest.mark.parametrize("call", [unary, streamed])
async def test_a_bug_is_logged_there_and_not_told_here(jobs, opened, call, caplog):
    jobs.failure = RuntimeError(HIDDEN)
    with caplog.at_level(logging.ERROR), pytest.raises(InternalError) as caught:
        await call(opened)
    assert HIDDEN not in str(caught.value)
    assert HIDDEN not in str(caught.value.context)
    assert HIDDEN in caplog.text
    jobs.failure = None
    jobs.release.set()
    assert await JobServiceStub(opened).GetJob(pb.GetJobRequest()) == pb.GetJobResponse()


async def test_a_deadline_that_passes_is_an_error_of_its_own_and_ends_the_work(jobs, opened):
    await opened.channel_ready()
    with pytest.raises(DeadlineExceeded), mesh_errors():
        await JobServiceStub(opened).GetJob(pb.GetJobRequest(), timeout=0.3)
    if jobs.started.is_set():  # On a busy machine the deadline may pass before that.
        await jobs.left.wait()


async def test_a_peer_that_is_not_there_is_unavailable():
    async with serve(Jobs()) as running:
        address = f"127.0.0.1:{running.port}"
    async with channel(address) as opened:
        with pytest.raises(Unavailable):
            await unary(opened)


async def test_a_method_that_the_server_does_not_have_is_an_error_and_no_hang(opened):
    call = opened.unary_unary(
        f"/{SERVICE}/Nothing",
        request_serializer=pb.GetJobRequest.SerializeToString,
        response_deserializer=pb.GetJobResponse.FromString,
    )
    with pytest.raises(Unimplemented, match="UNIMPLEMENTED"), mesh_errors():
        await call(pb.GetJobRequest())


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.NOT_FOUND, NotFound),
        (grpc.StatusCode.ALREADY_EXISTS, AlreadyExists),
        (grpc.StatusCode.ABORTED, Conflict),
        (grpc.StatusCode.FAILED_PRECONDITION, FailedPrecondition),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, CapacityExhausted),
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.UNIMPLEMENTED, Unimplemented),
        (grpc.StatusCode.UNKNOWN, InternalError),
        (grpc.StatusCode.PERMISSION_DENIED, InternalError),
    ],
)
async def test_a_status_that_is_none_of_ours_becomes_the_nearest_error(jobs, opened, code, error):
    jobs.bare = code
    with pytest.raises(MeshError, match=f"^{code.name}: as a proxy would$") as caught:
        await unary(opened)
    assert type(caught.value) is error


def test_a_write_to_a_call_that_has_ended_says_that_the_peer_is_away():
    # What gRPC's client raises where it has not heard yet why the call ended.
    nothing = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL, nothing, nothing, details="Internal error from Core"
    )
    assert type(to_error(error)) is Unavailable


async def test_a_message_that_is_too_large_is_refused_with_the_limit(opened):
    with pytest.raises(CapacityExhausted, match=f"larger than max .*{MAX_MESSAGE_BYTES}"):
        await JobClient(opened).get("x" * (MAX_MESSAGE_BYTES + 1))


@pytest.mark.parametrize("call", [unary, streamed])
async def test_a_client_that_goes_away_ends_the_work(jobs, opened, call):
    task = asyncio.ensure_future(call(opened))
    await jobs.started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await jobs.left.wait()


# --- health, reflection, drain -------------------------------------------------------------------


async def health(opened, service: str) -> str:
    response = await health_pb2_grpc.HealthStub(opened).Check(
        health_pb2.HealthCheckRequest(service=service)
    )
    return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_a_server_is_serving_only_while_it_says_so(jobs, service):
    async with serve(jobs) as running, channel(f"127.0.0.1:{running.port}") as opened:
        assert await health(opened, service) == "NOT_SERVING"
        await running.ready()
        assert await health(opened, service) == "SERVING"
        await running.not_ready()
        assert await health(opened, service) == "NOT_SERVING"


async def test_a_server_that_is_paused_does_not_serve_and_one_that_is_resumed_if_it_is_ready(jobs):
    async with serve(jobs) as running, channel(f"127.0.0.1:{running.port}") as opened:
        seen = []
        for step in (
            running.pause(paused=True),
            running.ready(),
            running.pause(paused=False),
            running.pause(paused=True),
            running.not_ready(),
            running.pause(paused=False),
        ):
            await step
            seen.append(await health(opened, SERVICE))
        assert seen == ["NOT_SERVING"] * 2 + ["SERVING"] + ["NOT_SERVING"] * 3


async def test_reflection_lists_the_services_and_has_their_files(opened):
    async def ask(**request):
        stub = reflection_pb2_grpc.ServerReflectionStub(opened)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**request)]))
        return await call.read()

    listed = await ask(list_services="")
    names = {service.name for service in listed.list_services_response.service}
    assert names == {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    files = await ask(file_containing_symbol=SERVICE)
    assert any(b"WatchJob" in file for file in files.file_descriptor_response.file_descriptor_proto)


async def test_a_call_under_way_finishes_while_health_already_says_no(jobs):
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(serve(jobs, drain_s=60))
        await running.ready()
        async with channel(f"127.0.0.1:{running.port}") as opened:
            watch = health_pb2_grpc.HealthStub(opened).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            call = asyncio.ensure_future(JobServiceStub(opened).GetJob(pb.GetJobRequest()))
            await jobs.started.wait()

            drained = asyncio.ensure_future(stack.aclose())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
            # The server says goodbye to its connections, takes no new ones, and keeps its calls.
            await opened.wait_for_state_change(grpc.ChannelConnectivity.READY)
            async with channel(f"127.0.0.1:{running.port}") as newcomer:
                with pytest.raises(Unavailable):
                    await unary(newcomer)
            assert not call.done()
            jobs.release.set()
            assert await call == pb.GetJobResponse()
            await drained


@pytest.mark.parametrize("call", [unary, streamed])
async def test_a_call_that_outlasts_the_drain_is_ended_as_unavailable(jobs, call):
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(serve(jobs, drain_s=0.05))
        async with channel(f"127.0.0.1:{running.port}") as opened:
            waiting = asyncio.ensure_future(call(opened))
            await jobs.started.wait()
            await stack.aclose()
            with pytest.raises(Unavailable):
                await waiting
            await jobs.left.wait()
