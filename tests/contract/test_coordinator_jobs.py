"""Jobs over gRPC: what their users are promised, whatever happens to the coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import random

import numpy as np
import pytest

from rollmesh import convert, types
from rollmesh.api.coordinator.v1 import job_service_pb2 as pb
from rollmesh.api.coordinator.v1.job_service_pb2_grpc import JobServiceStub
from rollmesh.client import Client
from rollmesh.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidRequest,
    NonFinite,
    NotFound,
    Overloaded,
    Unavailable,
)
from rollmesh.job import StateChanged, StepCompleted, Warned
from rollmesh.rpc.channel import channel
from rollmesh.rpc.status import mesh_errors
from services.coordinator.border import Outcome
from services.coordinator.play import playing
from tests.fakes.coordinator import PROJECT, Fakes, running_coordinator, spec_of

DATUM = types.Datum(np.array([1, 2], np.int32), np.array([2, 3], np.int32))
LOSS = types.LossConfig("cross_entropy")
ADAM = types.AdamConfig(learning_rate=0.1)


@pytest.fixture
def fakes():
    return Fakes()


@pytest.fixture
async def mesh(tmp_path, fakes):
    async with running_coordinator(tmp_path, fakes) as running:
        await running.until_served()
        yield running


def name(job: str) -> str:
    return f"{PROJECT}/jobs/{job}"


def states(events) -> list[str]:
    return [e.event.to_state for e in events if isinstance(e.event, StateChanged)]


async def watched(client, job, after=0) -> list:
    async with asyncio.timeout(20):
        return [event async for event in client.jobs.watch(name(job), after)]


class TestCreating:
    async def test_a_job_runs_to_its_end(self, mesh, fakes):
        job = await mesh.client.jobs.create(PROJECT, spec_of(), "j")
        assert (job.name, job.state) == (name("j"), "PENDING")
        fakes.script.step("j", 3)
        events = await watched(mesh.client, "j")
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        assert states(events) == ["PENDING", "RUNNING", "SUCCEEDED"]
        job = await mesh.client.jobs.get(name("j"))
        assert (job.step, job.metrics, job.adapter) == (3, {"m": 3.0}, f"{PROJECT}/adapters/j")
        assert (job.state, job.state_reason) == ("SUCCEEDED", "all steps are done")

    async def test_a_job_without_an_id_is_given_one(self, mesh):
        first = await mesh.client.jobs.create(PROJECT, spec_of())
        second = await mesh.client.jobs.create(PROJECT, spec_of())
        assert first.name.startswith(name("job-"))
        assert first.name != second.name

    async def test_the_answer_has_every_default_and_the_first_task_only(self, mesh):
        job = await mesh.client.jobs.create(PROJECT, spec_of(), "j")
        assert len(job.spec.dataset.tasks) == 1
        assert {"group_size", "learning_rate"} <= job.spec.algorithm.model_fields_set
        assert job.spec.adapter.id == "j"

    async def test_a_repeated_request_answers_the_same_job_even_when_nobody_else_answers(
        self, mesh, fakes
    ):
        first = await mesh.client.jobs.create(PROJECT, spec_of(), request_id="r")
        fakes.reward.away = True
        again = await mesh.client.jobs.create(PROJECT, spec_of(), request_id="r")
        assert again.name == first.name
        assert len([job async for job in mesh.client.jobs.list(PROJECT)]) == 1

    async def test_a_request_repeated_many_times_at_once_makes_one_job(self, mesh):
        made = await asyncio.gather(
            *(mesh.client.jobs.create(PROJECT, spec_of(), request_id="r") for _ in range(8))
        )
        assert len({job.name for job in made}) == 1

    async def test_a_request_id_with_other_content_is_refused(self, mesh):
        await mesh.client.jobs.create(PROJECT, spec_of(), request_id="r")
        with pytest.raises(AlreadyExists, match="request_id 'r'"):
            await mesh.client.jobs.create(PROJECT, spec_of(seed=1), request_id="r")

    async def test_a_taken_id_or_adapter_is_refused(self, mesh):
        await mesh.client.jobs.create(PROJECT, spec_of(), "j")
        with pytest.raises(AlreadyExists, match="jobs/j"):
            await mesh.client.jobs.create(PROJECT, spec_of(), "j")
        with pytest.raises(AlreadyExists, match="adapters/j"):
            await mesh.client.jobs.create(PROJECT, spec_of(adapter={"id": "j"}), "k")

    @pytest.mark.parametrize(
        ("changes", "error", "field", "says"),
        [
            pytest.param(
                {"base_model": "nope"}, NotFound, "base_model", "arith", id="unknown base model"
            ),
            pytest.param(
                {"adapter": {"rank": 64}}, InvalidRequest, "adapter.rank", "32", id="rank too large"
            ),
            pytest.param(
                {"algorithm": {"max_staleness": 3}},
                InvalidRequest,
                "algorithm.max_staleness",
                "2",
                id="versions that the trainer has forgotten",
            ),
            pytest.param(
                {"adapter": {"target_modules": ["x_proj"]}},
                InvalidRequest,
                "adapter.target_modules",
                "q_proj, v_proj",
                id="unknown module",
            ),
            pytest.param(
                {"prompt": {"text": "{nope}"}},
                InvalidRequest,
                "prompt.text",
                "answer, question",
                id="a prompt of a field that no task has",
            ),
            pytest.param(
                {"prompt": {"text": "{question"}},
                InvalidRequest,
                "prompt.text",
                "expected '}'",
                id="malformed template",
            ),
            pytest.param(
                {"reward": {"function": "even", "reference": "{nope}"}},
                InvalidRequest,
                "reward.reference",
                "answer, question",
                id="a reference of a field that no task has",
            ),
            pytest.param(
                {"reward": {"function": "odd"}},
                InvalidRequest,
                "reward.function",
                "even",
                id="unknown reward function",
            ),
            pytest.param(
                {"reward": {"function": "even", "parameters": {"bonsu": 1}}},
                InvalidRequest,
                "reward.parameters.bonsu",
                "unknown key",
                id="unknown parameter of the reward function",
            ),
            pytest.param(
                {"dataset": {"generator": {"name": "algebra"}}},
                InvalidRequest,
                "dataset.generator.name",
                "arithmetic",
                id="unknown generator",
            ),
            pytest.param(
                {"evaluation": {"dataset": {"generator": {"name": "arithmetic"}}}},
                InvalidRequest,
                "evaluation.dataset.generator.parameters.count",
                "count",
                id="a generator without what it needs",
            ),
            pytest.param(
                {"sft": {"completion": "{nope}"}},
                InvalidRequest,
                "sft.completion",
                "answer, question",
                id="a completion of a field that no task has",
            ),
            pytest.param(
                {"sft": {"completion": "{answer}" * 100}},
                InvalidRequest,
                "sft.completion",
                "65 together",
                id="a completion that the trainer cannot read",
            ),
            pytest.param(
                {"distillation": {"teacher_base_model": "nope"}},
                NotFound,
                "distillation.teacher_base_model",
                "nobody serves 'nope'",
                id="a teacher that nobody serves",
            ),
        ],
    )
    async def test_a_spec_that_cannot_work_is_refused_with_its_key(
        self, mesh, changes, error, field, says
    ):
        with pytest.raises(error) as refusal:
            await mesh.client.jobs.create(PROJECT, spec_of(**changes), "j")
        assert refusal.value.context["field"] == field
        assert says in str(refusal.value)
        with pytest.raises(NotFound):
            await mesh.client.jobs.get(name("j"))

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            pytest.param({"parent": "p"}, "parent", id="no project"),
            pytest.param({"job_id": "J"}, "job_id", id="bad id"),
            pytest.param({"request_id": ""}, "request_id", id="no request_id"),
            pytest.param({"request_id": "r" * 129}, "request_id", id="overlong request_id"),
        ],
    )
    async def test_a_request_that_is_not_one_is_refused(self, mesh, changes, field):
        fields = {"parent": PROJECT, "job_id": "j", "request_id": "r", **changes}
        request = pb.CreateJobRequest(**fields, spec=convert.spec_to_pb(spec_of()))
        async with channel(f"127.0.0.1:{mesh.port}") as raw:
            with pytest.raises(InvalidRequest) as refusal, mesh_errors():
                await JobServiceStub(raw).CreateJob(request)
        assert refusal.value.context["field"] == field

    async def test_before_the_mesh_was_heard_of_an_unknown_base_model_may_be_asked_again(
        self, tmp_path, fakes
    ):
        fakes.trainer.away = True
        async with running_coordinator(tmp_path, fakes) as mesh:
            with pytest.raises(Unavailable, match=r"nothing was heard yet of .*t:1"):
                await mesh.client.jobs.create(PROJECT, spec_of(base_model="nope"))

    async def test_more_waiting_jobs_than_configured_are_refused(self, tmp_path, fakes):
        fakes.trainer.away = True
        async with running_coordinator(tmp_path, fakes, max_pending_jobs=1) as mesh:
            await mesh.client.jobs.create(PROJECT, spec_of(), "j")
            with pytest.raises(Overloaded, match="max_pending_jobs"):
                await mesh.client.jobs.create(PROJECT, spec_of(), "k")


class TestListing:
    async def test_pages_are_newest_first_and_of_one_project(self, mesh):
        for job in ("a", "b", "c"):
            await mesh.client.jobs.create(PROJECT, spec_of(), job)
        await mesh.client.jobs.create("projects/other", spec_of(), "d")
        async with channel(f"127.0.0.1:{mesh.port}") as raw:
            stub = JobServiceStub(raw)
            first = await stub.ListJobs(pb.ListJobsRequest(parent=PROJECT, page_size=2))
            assert [job.name for job in first.jobs] == [name("c"), name("b")]
            request = pb.ListJobsRequest(
                parent=PROJECT, page_size=2, page_token=first.next_page_token
            )
            second = await stub.ListJobs(request)
            assert [job.name for job in second.jobs] == [name("a")]
            assert second.next_page_token == ""

    async def test_another_project_does_not_see_a_job(self, mesh):
        await mesh.client.jobs.create(PROJECT, spec_of(), "j")
        with pytest.raises(NotFound):
            await mesh.client.jobs.get("projects/other/jobs/j")


class TestRunning:
    async def test_a_job_that_fails_says_why_and_leaves_the_others_alone(self, mesh, fakes):
        for job in ("bad", "good"):
            await mesh.client.jobs.create(PROJECT, spec_of(), job)
            await mesh.until(job, "RUNNING")
        fakes.script.fail("bad", NonFinite("the loss of step 1 is NaN"))
        assert await mesh.until("bad", "FAILED") == "the loss of step 1 is NaN"
        fakes.script.step("good", 3)
        await mesh.until("good", "SUCCEEDED")

    async def test_a_bug_in_one_loop_fails_its_job_alone(self, mesh, fakes):
        for job in ("bad", "good"):
            await mesh.client.jobs.create(PROJECT, spec_of(), job)
            await mesh.until(job, "RUNNING")
        fakes.script.fail("bad", ZeroDivisionError("oops"))
        assert "internal error" in await mesh.until("bad", "FAILED")
        fakes.script.step("good", 3)
        await mesh.until("good", "SUCCEEDED")

    async def test_an_adapter_that_the_trainer_refuses_fails_the_job(self, tmp_path, fakes):
        fakes.trainer.away = True  # so that nobody can tell before
        async with running_coordinator(tmp_path, fakes) as mesh:
            await mesh.client.jobs.create(PROJECT, spec_of(), "j")
            fakes.trainer.refuses = InvalidRequest("lora.rank: too large", field="lora.rank")
            fakes.trainer.away = False
            assert await mesh.until("j", "FAILED") == "lora.rank: too large"
        assert fakes.script.started == []

    async def test_no_more_jobs_run_than_may_and_the_others_come_in_their_order(
        self, tmp_path, fakes
    ):
        async with running_coordinator(tmp_path, fakes, max_running_jobs=2) as mesh:
            for job in ("a", "b", "c", "d"):
                await mesh.client.jobs.create(PROJECT, spec_of(), job)
            await mesh.until_reason("c", "2 jobs run, which is the most")
            await mesh.until_reason("d", "2 jobs run, which is the most")
            await fakes.script.until_started("a", "b")
            fakes.script.step("b", 3)
            await fakes.script.until_started("a", "b", "c")
            fakes.script.step("c", 3)
            await fakes.script.until_started("a", "b", "c", "d")

    @pytest.mark.parametrize("missing", ["trainer", "sampler"])
    async def test_a_job_waits_for_what_its_base_model_lacks(self, tmp_path, fakes, missing):
        getattr(fakes, missing).away = True
        async with running_coordinator(tmp_path, fakes) as mesh:
            await mesh.client.jobs.create(PROJECT, spec_of(), "j")
            await mesh.until_reason("j", f"no {missing} of 'arith' serves")
            getattr(fakes, missing).away = False
            await mesh.until("j", "RUNNING")
            assert (await mesh.client.jobs.get(name("j"))).state_reason == ""

    async def test_a_job_that_waits_for_its_base_model_does_not_hold_up_another(
        self, tmp_path, fakes
    ):
        models = [{"name": "arith"}, {"name": "big"}]
        async with running_coordinator(
            tmp_path, fakes, max_running_jobs=1, base_models=models
        ) as mesh:
            await mesh.client.jobs.create(PROJECT, spec_of(base_model="big"), "first")
            await mesh.until_reason("first", "no trainer of 'big' serves")
            await mesh.client.jobs.create(PROJECT, spec_of(), "second")
            await mesh.until("second", "RUNNING")

    async def test_a_job_waits_until_a_trainer_has_room(self, mesh, fakes):
        fakes.trainer.max_adapters = 1
        await mesh.client.jobs.create(PROJECT, spec_of(), "a")
        await mesh.until("a", "RUNNING")
        await mesh.client.jobs.create(PROJECT, spec_of(), "b")
        await mesh.until_reason("b", "every trainer of 'arith' is full")
        decisions = (await mesh.client.fleet.explain(PROJECT)).decisions
        started = [decision.subject for decision in decisions if decision.action == "STARTED"]
        assert started == [name("a")], "an attempt is no start"
        fakes.script.step("a", 3)
        await mesh.until("a", "SUCCEEDED")
        await mesh.client.adapters.delete(f"{PROJECT}/adapters/a")
        await mesh.until("b", "RUNNING")

    async def test_the_real_loop_trains_an_adapter_on_this_coordinator(self, tmp_path, fakes):
        spec = spec_of(
            algorithm={"group_size": 2, "groups_per_step": 2},
            stop={"max_steps": 2},
            evaluation={"dataset": {"tasks": [{"fields": {"question": "1", "answer": "1"}}]}},
        )
        async with running_coordinator(tmp_path, fakes, play=playing) as mesh:
            await mesh.client.jobs.create(PROJECT, spec, "j")
            assert await mesh.until("j", "SUCCEEDED") == "all 2 steps are done"
            job = await mesh.client.jobs.get(name("j"))
            assert (job.step, job.first_evaluation.step, job.last_evaluation.step) == (2, 0, 2)
            adapter = await mesh.client.adapters.get(job.adapter)
            assert (adapter.policy_version, adapter.published_version) == (2, 2)


class TestPausing:
    async def test_a_running_job_pauses_after_its_step_and_goes_on_there(self, mesh, fakes):
        await mesh.client.jobs.create(PROJECT, spec_of(), "j")
        fakes.script.step("j")
        await mesh.until_step("j", 1)
        job = await mesh.client.jobs.pause(name("j"))
        assert (job.state, job.step) == ("RUNNING", 1)
        assert "when the step" in job.state_reason
        fakes.script.step("j")
        assert await mesh.until("j", "PAUSED") == "paused after step 2"
        job = await mesh.client.jobs.resume(name("j"))
        assert job.state == "PENDING"
        fakes.script.step("j")
        await mesh.until("j", "SUCCEEDED")
        assert fakes.script.started == [("j", 0), ("j", 2)]

    async def test_a_waiting_job_pauses_at_once_and_is_not_started(self, tmp_path, fakes):
        async with running_coordinator(tmp_path, fakes, max_running_jobs=1) as mesh:
            for job in ("a", "b", "c"):
                await mesh.client.jobs.create(PROJECT, spec_of(), job)
            assert (await mesh.client.jobs.pause(name("b"))).state == "PAUSED"
            fakes.script.step("a", 3)
            await fakes.script.until_started("a", "c")

    async def test_a_pause_can_be_withdrawn_until_the_step_is_over(self, mesh, fakes):
        await mesh.client.jobs.create(PROJECT, spec_of(), "j")
        await mesh.until("j", "RUNNING")
        await mesh.client.jobs.pause(name("j"))
        assert (await mesh.client.jobs.resume(name("j"))).state == "RUNNING"
        fakes.script.step("j", 3)
        await mesh.until("j", "SUCCEEDED")
        assert "PAUSED" not in states(await watched(mesh.client, "j"))

    async def test_pausing_twice_or_resuming_what_runs_changes_nothing(self, mesh, fakes):
        await mesh.client.jobs.create(PROJECT, spec_of(), "j")
        await mesh.until("j", "RUNNING")
        assert (await mesh.client.jobs.resume(name("j"))).state == "RUNNING"
        for _ in range(2):
            await mesh.client.jobs.pause(name("j"))
        fakes.script.step("j")
        await mesh.until("j", "PAUSED")
        assert (await mesh.client.jobs.pause(name("j"))).state == "PAUSED"
        assert states((await mesh.store.jobs.events(name("j"), after=0)).events) == [
            "PENDING",
            "RUNNING",
            "PAUSED",
        ]


class TestCancelling:
    async def test_a_running_job_ends_at_once_and_its_loop_with_it(self, mesh, fakes):
        await mesh.client.jobs.create(PROJECT, spec_of(), "j")
        fakes.script.step("j")
        await mesh.until_step("j", 1)
        job = await mesh.client.jobs.cancel(name("j"))
        assert job.state == "CANCELLED"
        await fakes.script.until_stopped("j")
        # The adapter is kept, and free.
        adapter = await mesh.client.adapters.get(f"{PROJECT}/adapters/j")
        assert adapter.job == name("j")

    async def test_samples_under_way_are_aborted(self, tmp_path, fakes):
        fakes.sampler.sampling.clear()
        async with running_coordinator(tmp_path, fakes, play=playing) as mesh:
            await mesh.client.jobs.create(PROJECT, spec_of(), "j")
            await fakes.sampler.until_running(32)
            await mesh.client.jobs.cancel(name("j"))
            await fakes.sampler.until_running(0)
        assert fakes.sampler.num_aborted == 32

    async def test_a_waiting_job_is_never_started(self, tmp_path, fakes):
        async with running_coordinator(tmp_path, fakes, max_running_jobs=1) as mesh:
            for job in ("a", "b", "c"):
                await mesh.client.jobs.create(PROJECT, spec_of(), job)
            await mesh.client.jobs.cancel(name("b"))
            fakes.script.step("a", 3)
            await fakes.script.until_started("a", "c")

    async def test_a_job_whose_adapter_is_being_made_can_be_cancelled(self, mesh, fakes):
        fakes.trainer.creating.clear()
        await mesh.client.jobs.create(PROJECT, spec_of(), "j")
        async with asyncio.timeout(20):
            await fakes.trainer.asked.wait()
        assert (await mesh.client.jobs.cancel(name("j"))).state == "CANCELLED"
        fakes.trainer.creating.set()
        await mesh.client.jobs.create(PROJECT, spec_of(adapter={"id": "j"}), "k")
        await fakes.script.until_started("k")  # the name was free again

    async def test_a_paused_job_can_be_cancelled(self, mesh, fakes):
        await mesh.client.jobs.create(PROJECT, spec_of(), "j")
        await mesh.until("j", "RUNNING")
        await mesh.client.jobs.pause(name("j"))
        fakes.script.step("j")
        await mesh.until("j", "PAUSED")
        assert (await mesh.client.jobs.cancel(name("j"))).state == "CANCELLED"

    async def test_cancelling_twice_is_fine_and_ended_jobs_stay_as_they_are(self, mesh, fakes):
        await mesh.client.jobs.create(PROJECT, spec_of(), "c")
        for _ in range(2):
            assert (await mesh.client.jobs.cancel(name("c"))).state == "CANCELLED"
        await mesh.client.jobs.create(PROJECT, spec_of(), "j")
        fakes.script.step("j", 3)
        await mesh.until("j", "SUCCEEDED")
        for method in (
            mesh.client.jobs.cancel,
            mesh.client.jobs.pause,
            mesh.client.jobs.resume,
        ):
            with pytest.raises(FailedPrecondition, match="SUCCEEDED"):
                await method(name("j"))
        assert (
            len(await watched(mesh.client, "c"))
            == (await mesh.client.jobs.get(name("c"))).last_event
        )


class TestWatching:
    @pytest.mark.parametrize("after", range(8))
    async def test_the_events_of_an_ended_job_from_any_number(self, mesh, fakes, after):
        await mesh.client.jobs.create(PROJECT, spec_of(), "j")
        fakes.script.step("j", 3)
        await mesh.until("j", "SUCCEEDED")
        events = await watched(mesh.client, "j", min(after, 6))
        assert [event.number for event in events] == list(range(min(after, 6) + 1, 7))

    async def test_every_watcher_sees_every_event_once_however_they_come(self, mesh, fakes):
        """Writers at full speed; watchers that come, break off and come back at random."""
        await mesh.client.jobs.create(PROJECT, spec_of(stop={"max_steps": 1}), "j")
        await mesh.until("j", "RUNNING")

        async def write(writer: int) -> None:
            for number in range(40):
                await mesh.store.jobs.record(
                    name("j"), Warned(reason="R", message=f"{writer}/{number}"), now=0.0
                )

        async def watch(seed: int) -> list[int]:
            rng, seen = random.Random(seed), []
            while True:
                patience = rng.randint(1, 30)
                after = seen[-1] if seen else 0
                async for event in mesh.client.jobs.watch(name("j"), after):
                    seen.append(event.number)
                    if isinstance(event.event, StateChanged) and len(seen) > 2:
                        return seen
                    patience -= 1
                    if not patience:
                        break

        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            watchers = [tasks.create_task(watch(seed)) for seed in range(3)]
            async with asyncio.TaskGroup() as writers:
                for writer in range(3):
                    writers.create_task(write(writer))
            fakes.script.step("j")
        last = (await mesh.client.jobs.get(name("j"))).last_event
        assert last == 2 + 120 + 2  # created, started; the warnings; the step, the end
        for watcher in watchers:
            assert watcher.result() == list(range(1, last + 1))

    @pytest.mark.parametrize("after", [-1, 3])
    async def test_a_number_that_the_job_has_not_come_to_is_refused(self, tmp_path, fakes, after):
        fakes.trainer.away = True
        async with running_coordinator(tmp_path, fakes) as mesh:
            await mesh.client.jobs.create(PROJECT, spec_of(), "j")
            with pytest.raises(InvalidRequest, match="from 1 to 1"):
                await watched(mesh.client, "j", after)

    async def test_a_job_that_is_not_there_cannot_be_watched(self, mesh):
        with pytest.raises(NotFound):
            await watched(mesh.client, "nope")


class TestRestart:
    async def test_a_successor_goes_on_with_what_ran_and_what_waited(self, tmp_path, fakes):
        async with running_coordinator(tmp_path, fakes, max_running_jobs=1) as first:
            for job in ("a", "b"):
                await first.client.jobs.create(PROJECT, spec_of(), job)
            fakes.script.step("a", 2)
            await first.until_step("a", 2)
        assert fakes.script.stopped == ["a"]
        async with running_coordinator(tmp_path, fakes, max_running_jobs=1) as second:
            fakes.script.step("a")
            await second.until("a", "SUCCEEDED")
            fakes.script.step("b", 3)
            await second.until("b", "SUCCEEDED")
            # Nobody who watched could tell: the end of the first was no event.
            events = await watched(second.client, "a")
            assert states(events) == ["PENDING", "RUNNING", "SUCCEEDED"]
            steps = [e.event.step for e in events if isinstance(e.event, StepCompleted)]
            assert steps == [1, 2, 3]
        assert fakes.script.started == [("a", 0), ("a", 2), ("b", 0)]

    async def test_a_pause_that_was_asked_for_holds(self, tmp_path, fakes):
        async with running_coordinator(tmp_path, fakes) as first:
            await first.client.jobs.create(PROJECT, spec_of(), "j")
            await first.until("j", "RUNNING")
            await first.client.jobs.pause(name("j"))
        async with running_coordinator(tmp_path, fakes) as second:
            await second.until("j", "PAUSED")
            await second.client.jobs.resume(name("j"))
            fakes.script.step("j", 3)
            await second.until("j", "SUCCEEDED")

    async def test_a_queue_that_was_read_before_a_pause_does_not_take_it_back(
        self, tmp_path, fakes, monkeypatch
    ):
        go, recorded, taken_in, on = (asyncio.Event() for _ in range(4))

        def play(*_):
            async def steps(context, recorder):
                await go.wait()
                await recorder.record(
                    StepCompleted(step=1, policy_version=1, metrics={}, phases={})
                )
                recorded.set()
                await taken_in.wait()
                was_told = context.pause_requested()
                on.set()
                return Outcome("paused" if was_told else "finished", "the only step")

            return steps

        async with running_coordinator(tmp_path, fakes, play=play) as mesh:
            await mesh.client.jobs.create(PROJECT, spec_of(), "j")
            await mesh.until("j", "RUNNING")
            read, late = asyncio.Event(), asyncio.Event()
            queue = mesh.store.jobs.queue

            async def slow():
                if read.is_set():
                    taken_in.set()
                    await on.wait()
                    return await queue()
                found = await queue()
                read.set()
                await late.wait()
                return found

            monkeypatch.setattr(mesh.store.jobs, "queue", slow)
            await read.wait()
            await mesh.client.jobs.pause(name("j"))
            go.set()
            await recorded.wait()
            late.set()
            await mesh.until("j", "PAUSED")

    async def test_a_job_does_not_notice_that_its_trainer_was_restarted(self, tmp_path, fakes):
        stepped, go = asyncio.Event(), asyncio.Event()

        def play(peers):
            training = peers.training

            async def trains(context, recorder):
                for step in range(3):
                    adapter, job = context.adapter, context.name
                    await training.forward_backward(adapter, 2 * step + 1, [DATUM], LOSS, job=job)
                    await training.optim_step(adapter, 2 * step + 2, ADAM, job=job)
                    version = (await training.publish_adapter(adapter)).policy_version
                    await recorder.record(
                        StepCompleted(step=step + 1, policy_version=version, metrics={}, phases={})
                    )
                    stepped.set()
                    await go.wait()
                return Outcome("finished", "all steps are done")

            return trains

        async with running_coordinator(tmp_path, fakes, play=play) as mesh:
            await mesh.client.jobs.create(PROJECT, spec_of(adapter={"id": "a"}), "j")
            await stepped.wait()
            fakes.trainer.restart()
            go.set()
            assert await mesh.until("j", "SUCCEEDED", "FAILED") == "all steps are done"
            adapter = await mesh.client.adapters.get(f"{PROJECT}/adapters/a")
            assert (adapter.policy_version, adapter.next_sequence) == (3, 7)

    async def test_a_running_job_waits_where_its_trainer_is_slower_to_come_back(
        self, tmp_path, fakes
    ):
        async with running_coordinator(tmp_path, fakes) as first:
            await first.client.jobs.create(PROJECT, spec_of(), "j")
            await first.until("j", "RUNNING")
        fakes.trainer.away = True
        async with running_coordinator(tmp_path, fakes) as second:
            await second.until_reason("j", "no trainer of")
            fakes.trainer.away = False
            fakes.script.step("j", 3)
            await second.until("j", "SUCCEEDED")

    async def test_watchers_are_sent_to_the_successor(self, tmp_path, fakes):
        seen = asyncio.Event()

        async def watch(client: Client) -> None:
            async for event in client.jobs.watch(name("j")):
                if event.number == 2:
                    seen.set()

        async with contextlib.AsyncExitStack() as stack:
            async with running_coordinator(tmp_path, fakes, drain_s=60) as mesh:
                client = await stack.enter_async_context(Client(f"127.0.0.1:{mesh.port}"))
                await mesh.client.jobs.create(PROJECT, spec_of(), "j")
                watching = asyncio.ensure_future(watch(client))
                await seen.wait()
            # The coordinator is gone now, without having waited for drain_s.
            with pytest.raises(Unavailable, match="going away"):
                await watching
