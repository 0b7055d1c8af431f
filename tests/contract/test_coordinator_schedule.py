"""Quotas, classes and the schedule over gRPC: who waits, who is refused, and what both are told."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest
from google.rpc.error_details_pb2 import QuotaFailure, RetryInfo
from grpc_status import rpc_status

from rollmesh import types
from rollmesh.api.common.v1 import policy_pb2
from rollmesh.api.coordinator.v1 import sampling_service_pb2
from rollmesh.api.coordinator.v1.sampling_service_pb2_grpc import SamplingServiceStub
from rollmesh.errors import InvalidRequest, NotFound, QuotaExceeded
from rollmesh.rpc.channel import channel
from services.coordinator.store import StoreUnavailable
from tests.fakes.coordinator import PROJECT, Fakes, eventually, running_coordinator, spec_of

BASE = types.PolicyRef(base_model="arith")
LORA = types.LoraConfig(rank=4)


@pytest.fixture
def fakes():
    return Fakes()


@pytest.fixture
def start(tmp_path, fakes):
    """Starts a coordinator whose project p has some limits."""

    @contextlib.asynccontextmanager
    async def start(*, coordinator=None, **limits):
        projects = [{"id": "p", **limits}]
        settings = {"projects": projects, **(coordinator or {})}
        async with running_coordinator(tmp_path, fakes, **settings) as running:
            await running.until_served()
            yield running

    return start


async def sample(mesh, *, project=PROJECT, **options):
    return await mesh.client.sampling.sample(project, BASE, [1, 2], **options)


def name(job):
    return f"{PROJECT}/jobs/{job}"


async def queue_of(mesh, job):
    """The status of a job that waits, once it is known."""

    async def known():
        return (await mesh.client.jobs.get(name(job))).queue is not None

    await eventually(known)
    return (await mesh.client.jobs.get(name(job))).queue


async def test_a_call_over_the_tokens_of_the_day_says_so_in_any_language(start):
    async with start(tokens_per_day=3) as mesh:
        await sample(mesh)
        async with channel(f"127.0.0.1:{mesh.port}") as opened:
            request = sampling_service_pb2.SampleRequest(
                project=PROJECT,
                policy=policy_pb2.PolicyRef(base_model="arith"),
                prompt_token_ids=[1, 2],
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await SamplingServiceStub(opened).Sample(request).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        failure, retry = QuotaFailure(), RetryInfo()
        details = rpc_status.from_call(caught.value).details
        assert any(detail.Unpack(failure) for detail in details)
        assert any(detail.Unpack(retry) for detail in details)
        (violation,) = failure.violations
        assert violation.subject == "projects/p"
        assert "4" in violation.description
        assert "3" in violation.description
        assert 0 < retry.retry_delay.ToSeconds() <= 86400
        with pytest.raises(QuotaExceeded) as raised:
            await sample(mesh)
        assert raised.value.context["quota"] == "tokens_per_day"
        assert raised.value.retry_after_s > 0
        await sample(mesh, project="projects/other")


async def test_what_was_used_of_a_day_is_known_after_a_restart(start):
    async with start(tokens_per_day=3) as mesh:
        await sample(mesh)
    async with start(tokens_per_day=3) as mesh:
        with pytest.raises(QuotaExceeded):
            await sample(mesh)


async def test_a_class_above_the_projects_is_refused_for_calls_and_jobs(start):
    async with start(max_priority="normal") as mesh:
        with pytest.raises(InvalidRequest) as caught:
            await sample(mesh, priority="high")
        assert caught.value.context["field"] == "priority"
        with pytest.raises(InvalidRequest) as caught:
            await mesh.client.jobs.create(PROJECT, spec_of(priority="high"), "j")
        assert caught.value.context["field"] == "priority"
        assert caught.value.context["allowed"] == "low, normal"
        await sample(mesh, priority="low")


async def test_a_call_of_a_higher_class_takes_the_place_of_a_lower_one_which_goes_on(start, fakes):
    sampler = fakes.sampler
    async with start(max_priority="high", coordinator={"max_running_completions": 1}) as mesh:
        sampler.sampling.clear()
        low = asyncio.create_task(sample(mesh, priority="low"))
        await sampler.until_running(1)

        async def shown():
            schedule = await mesh.client.fleet.explain(PROJECT)
            return "PREEMPTED" in [decision.action for decision in schedule.decisions]

        high = asyncio.create_task(sample(mesh, priority="high"))
        await eventually(shown)
        sampler.sampling.set()
        assert (await high)[0].token_ids == (1, 2)
        assert (await low)[0].token_ids == (1, 2)
        assert sampler.num_aborted == 1


async def test_one_adapter_too_many_is_refused_before_anything_is_made(start, fakes):
    async with start(max_adapters=2) as mesh:
        for adapter in ("a", "b"):
            await mesh.client.adapters.create(f"{PROJECT}/adapters/{adapter}", "arith", LORA)
        for _ in range(2):
            with pytest.raises(QuotaExceeded) as caught:
                await mesh.client.adapters.create(f"{PROJECT}/adapters/c", "arith", LORA)
            assert caught.value.context["quota"] == "adapters"
        await mesh.client.checkpoints.create(f"{PROJECT}/adapters/a/checkpoints/k")
        with pytest.raises(QuotaExceeded):
            await mesh.client.adapters.fork(
                f"{PROJECT}/adapters/d", f"{PROJECT}/adapters/a/checkpoints/k"
            )
        assert sorted(fakes.trainer.adapters) == [f"{PROJECT}/adapters/a", f"{PROJECT}/adapters/b"]
        await mesh.client.adapters.create("projects/other/adapters/c", "arith", LORA)
        await mesh.client.adapters.delete(f"{PROJECT}/adapters/b")
        await mesh.client.adapters.create(f"{PROJECT}/adapters/c", "arith", LORA)


async def test_many_at_once_make_no_more_adapters_than_there_may_be(start, fakes):
    async with start(max_adapters=3) as mesh:
        outcomes = await asyncio.gather(
            *(
                mesh.client.adapters.create(f"{PROJECT}/adapters/a{number}", "arith", LORA)
                for number in range(8)
            ),
            return_exceptions=True,
        )
        assert sum(isinstance(outcome, QuotaExceeded) for outcome in outcomes) == 5
        assert len(fakes.trainer.adapters) == 3


async def test_a_job_that_needs_one_adapter_too_many_waits_and_never_fails(start, fakes):
    async with start(max_adapters=1) as mesh:
        await mesh.client.adapters.create(f"{PROJECT}/adapters/mine", "arith", LORA)
        await mesh.client.jobs.create(PROJECT, spec_of(), "j")
        assert (await queue_of(mesh, "j")).rule == "PROJECT_ADAPTERS"
        await mesh.client.adapters.delete(f"{PROJECT}/adapters/mine")
        await mesh.until("j", "RUNNING")
        with pytest.raises(QuotaExceeded):
            await mesh.client.adapters.create(f"{PROJECT}/adapters/mine", "arith", LORA)


@pytest.mark.parametrize("command", ["pause", "cancel"])
async def test_a_creation_that_is_cut_off_keeps_no_place_of_the_quota(start, fakes, command):
    create, entered, released = fakes.trainer.create_adapter, asyncio.Event(), asyncio.Event()

    async def slow(*args, **options):
        entered.set()
        await released.wait()
        return await create(*args, **options)

    fakes.trainer.create_adapter = slow
    async with start(max_adapters=1) as mesh:
        await mesh.client.jobs.create(PROJECT, spec_of(), "j")
        async with asyncio.timeout(30):
            await entered.wait()
        await getattr(mesh.client.jobs, command)(name("j"))
        released.set()
        if command == "pause":
            await mesh.client.jobs.resume(name("j"))
            await mesh.until("j", "RUNNING")
        else:
            await mesh.client.jobs.create(PROJECT, spec_of(adapter={"id": "another"}), "k")
            await mesh.until("k", "RUNNING")


async def test_a_creation_that_could_not_be_written_down_is_tried_again(start, monkeypatch):
    async with start(max_adapters=1) as mesh:
        confirm, failed = mesh.store.adapters.confirm, []

        async def fail_once(*args, **options):
            if not failed:
                failed.append(args)
                raise StoreUnavailable("the coordinator's database does not answer")
            return await confirm(*args, **options)

        monkeypatch.setattr(mesh.store.adapters, "confirm", fail_once)
        await mesh.client.jobs.create(PROJECT, spec_of(), "j")
        await mesh.until("j", "RUNNING")
        assert failed


async def test_jobs_over_a_quota_wait_in_order_and_say_where_they_stand(start, fakes):
    async with start(max_running_jobs=1) as mesh:
        for job in ("a", "b", "c"):
            await mesh.client.jobs.create(PROJECT, spec_of(), job)
        await fakes.script.until_started("a")
        first, second = await queue_of(mesh, "b"), await queue_of(mesh, "c")
        assert (first.position, first.rule) == (1, "PROJECT_RUNNING_JOBS")
        assert (second.position, second.rule) == (2, "PROJECT_RUNNING_JOBS")
        assert first.eta_high_s is None
        listed = {job.name: job async for job in mesh.client.jobs.list(PROJECT)}
        assert listed[name("a")].queue is None
        assert listed[name("c")].queue == second
        assert listed[name("c")].state_reason == second.reason

        fakes.script.step("a")
        await mesh.until_step("a", 1)

        async def has_eta():
            return (await mesh.client.jobs.get(name("b"))).queue.eta_high_s is not None

        await eventually(has_eta)
        eta = (await mesh.client.jobs.get(name("b"))).queue
        assert 0 <= eta.eta_low_s <= eta.eta_high_s

        await mesh.client.jobs.pause(name("a"))  # its place is free at the border of its step
        fakes.script.step("a")
        await mesh.until("a", "PAUSED")
        await fakes.script.until_started("a", "b")
        await mesh.client.jobs.resume(name("a"))
        assert (await queue_of(mesh, "a")).position == 1


async def test_the_schedule_tells_of_jobs_requests_and_quotas(start, fakes):
    limits = {"max_running_jobs": 1, "max_adapters": 9, "weight": 2.0}
    async with start(coordinator={"max_running_completions": 1}, **limits) as mesh:
        for job in ("a", "b"):
            await mesh.client.jobs.create(PROJECT, spec_of(), job)
        await fakes.script.until_started("a")
        await queue_of(mesh, "b")
        fakes.sampler.sampling.clear()
        calls = [asyncio.create_task(sample(mesh)) for _ in range(2)]
        calls.append(asyncio.create_task(sample(mesh, project="projects/hidden")))

        async def all_there():
            return (await mesh.client.fleet.get()).num_queued_requests == 2

        await eventually(all_there)
        told = await mesh.client.fleet.explain(PROJECT)
        assert told.waiting[0].subject == name("b")
        assert told.waiting[0].rule == "PROJECT_RUNNING_JOBS"
        assert told.num_waiting == len(told.waiting) in {2, 3}
        assert "STARTED" in [decision.action for decision in told.decisions]
        quotas = {quota.name: quota for quota in told.quotas}
        assert quotas["running_jobs"] == types.Quota("running_jobs", 1, 1)
        assert quotas["adapters"] == types.Quota("adapters", 1, 9)
        (share,) = told.shares
        assert (share.base_model, share.weight) == ("arith", 2.0)
        assert "hidden" not in repr(told)
        of_job = await mesh.client.fleet.explain(PROJECT, name("b"))
        assert [waiting.subject for waiting in of_job.waiting] == [name("b")]
        fakes.sampler.sampling.set()
        await asyncio.gather(*calls)
        with pytest.raises(NotFound):
            await mesh.client.fleet.explain(PROJECT, name("nobody"))
        with pytest.raises(InvalidRequest):
            await mesh.client.fleet.explain("projects/other", name("b"))
        with pytest.raises(InvalidRequest):
            await mesh.client.fleet.explain("nothing")
