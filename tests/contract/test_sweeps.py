"""Sweeps over gRPC and from the command line, on a whole coordinator whose jobs are quick."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sys

import pytest

from rollmesh.api.coordinator.v1 import sweep_service_pb2 as pb
from rollmesh.api.coordinator.v1.sweep_service_pb2_grpc import SweepServiceStub
from rollmesh.cli.__main__ import main
from rollmesh.errors import AlreadyExists, CapacityExhausted, InvalidRequest, NotFound, Overloaded
from rollmesh.job import StateChanged, StepCompleted
from rollmesh.rpc.channel import channel
from rollmesh.sweep import SweepParameter, SweepSpec
from services.coordinator import sweeps as core
from services.coordinator.border import Outcome
from services.coordinator.jobs import Jobs
from services.coordinator.store import sweeps as sweep_store
from tests.fakes.coordinator import (
    PROJECT,
    Fakes,
    eventually,
    running_coordinator,
    spec_of,
)

PEAK = "algorithm.learning_rate.peak"
RATES = [0.1, 0.4, 0.3, 0.2]
HALVING = {"first_step": 1, "factor": 2, "metric": "reward"}


def sweep_of(rates=RATES, halving=HALVING, **changes) -> SweepSpec:
    return SweepSpec(
        base=spec_of(**changes), grid=[SweepParameter(path=PEAK, values=rates)], halving=halving
    )


class Racing:
    """Loops whose reward is their learning rate; `gate` closed: they wait before each step."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.steps: dict[str, list[int]] = {}

    async def __call__(self, context, recorder) -> Outcome:
        step = context.step
        while step < context.spec.stop.max_steps:
            if context.pause_requested():
                return Outcome("paused", "paused")
            if context.hold_step is not None and step >= context.hold_step:
                return Outcome("held", f"waits at step {step}")
            await self.gate.wait()
            step += 1
            metrics = {"reward_mean": context.spec.algorithm.learning_rate.peak}
            await recorder.record(
                StepCompleted(step=step, policy_version=step, metrics=metrics, phases={})
            )
            self.steps.setdefault(context.name.rpartition("/")[2], []).append(step)
        return Outcome("finished", "all steps are done")


@pytest.fixture
def racing():
    return Racing()


@pytest.fixture
def running(tmp_path, racing):
    fakes = Fakes()

    def running(**settings):
        return running_coordinator(
            tmp_path, fakes, play=lambda *_: racing, **{"max_running_jobs": 99, **settings}
        )

    return running


async def until_ended(client, sweep="s"):
    name = f"{PROJECT}/sweeps/{sweep}"

    async def has_ended():
        return (await client.sweeps.get(name)).state != "RUNNING"

    await eventually(has_ended)
    return await client.sweeps.get(name)


async def test_a_sweep_makes_jobs_that_share_the_fleet_and_its_losers_end_early(running, racing):
    async with running() as coordinator:
        client = coordinator.client
        made = await client.sweeps.create(PROJECT, sweep_of(), "s")
        assert made.state == "RUNNING"
        assert [job.job for job in made.jobs] == [f"{PROJECT}/jobs/s-{n}" for n in range(4)]
        job = await client.jobs.get(f"{PROJECT}/jobs/s-2")
        assert job.sweep == f"{PROJECT}/sweeps/s"
        assert job.spec.algorithm.learning_rate.peak == 0.3
        assert job.spec.adapter.id == "s-2"

        sweep = await until_ended(client)

        assert sweep.state == "ENDED"
        assert [
            (job.job.rpartition("/")[2], job.values, job.state, job.step, job.rung, job.halved)
            for job in sweep.jobs
        ] == [
            ("s-1", {PEAK: 0.4}, "SUCCEEDED", 3, 2, False),
            ("s-2", {PEAK: 0.3}, "CANCELLED", 2, 1, True),
            ("s-3", {PEAK: 0.2}, "CANCELLED", 1, 0, True),
            ("s-0", {PEAK: 0.1}, "CANCELLED", 1, 0, True),
        ]
        assert sweep.jobs[-1].state_reason == (
            "successive halving at step 1: reward 0.1 is 4th of 4, the best 2 go on"
        )
        assert racing.steps == {"s-0": [1], "s-1": [1, 2, 3], "s-2": [1, 2], "s-3": [1]}


async def test_fewer_places_than_jobs_still_bring_all_of_them_to_the_comparison(running, racing):
    async with running(max_running_jobs=1) as coordinator:
        await coordinator.client.sweeps.create(PROJECT, sweep_of(), "s")
        sweep = await until_ended(coordinator.client)
    assert [job.state for job in sweep.jobs].count("SUCCEEDED") == 1
    assert racing.steps == {"s-0": [1], "s-1": [1, 2, 3], "s-2": [1, 2], "s-3": [1]}


async def test_a_successor_goes_on_with_a_comparison_that_was_due(running, racing, monkeypatch):
    settle = sweep_store.SweepStore.settle
    asked = asyncio.Event()

    async def hangs(self, name, *, now):
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(sweep_store.SweepStore, "settle", hangs)
    async with running() as coordinator:
        await coordinator.client.sweeps.create(PROJECT, sweep_of(), "s")
        async with asyncio.timeout(20):
            await asked.wait()
    monkeypatch.setattr(sweep_store.SweepStore, "settle", settle)
    async with running() as coordinator:
        sweep = await until_ended(coordinator.client)
    assert sweep.jobs[0].job == f"{PROJECT}/jobs/s-1"
    assert racing.steps == {"s-0": [1], "s-1": [1, 2, 3], "s-2": [1, 2], "s-3": [1]}


async def test_its_user_cannot_resume_a_held_job_past_the_step(running, racing):
    async with running(max_running_jobs=1) as coordinator:
        client = coordinator.client
        # The first is held, the second never comes to the step.
        racing.gate.clear()
        spec = sweep_of(rates=[0.1, 0.2])
        await client.sweeps.create(PROJECT, spec, "s")
        await client.jobs.pause(f"{PROJECT}/jobs/s-1")
        racing.gate.set()
        await coordinator.until("s-0", "PAUSED")
        assert (await client.jobs.resume(f"{PROJECT}/jobs/s-0")).state == "PAUSED"
        await client.jobs.resume(f"{PROJECT}/jobs/s-1")
        sweep = await until_ended(client)
    assert sweep.jobs[0].job == f"{PROJECT}/jobs/s-1"
    assert racing.steps["s-0"] == [1]


async def test_a_sweep_is_cancelled_once_with_all_of_its_jobs(running, racing):
    racing.gate.clear()
    async with running() as coordinator:
        client = coordinator.client
        await client.sweeps.create(PROJECT, sweep_of(), "s")
        await coordinator.until("s-3", "RUNNING")
        cancelled = await client.sweeps.cancel(f"{PROJECT}/sweeps/s")
        assert cancelled.state == "CANCELLED"
        assert {job.state for job in cancelled.jobs} == {"CANCELLED"}
        assert await client.sweeps.cancel(f"{PROJECT}/sweeps/s") == cancelled
        events = [event.event async for event in client.jobs.watch(f"{PROJECT}/jobs/s-3")]
        assert isinstance(events[-1], StateChanged)
        assert events[-1].reason == "its sweep was cancelled"


async def test_the_same_request_answers_the_same_sweep(running, racing):
    racing.gate.clear()
    async with running() as coordinator:
        sweeps = coordinator.client.sweeps
        made = await sweeps.create(PROJECT, sweep_of(), request_id="r")
        assert made.name.startswith(f"{PROJECT}/sweeps/sweep-")
        assert (await sweeps.create(PROJECT, sweep_of(), request_id="r")).name == made.name
        with pytest.raises(AlreadyExists):
            await sweeps.create(PROJECT, sweep_of(rates=[1.0]), request_id="r")
        assert [sweep.name async for sweep in sweeps.list(PROJECT)] == [made.name]


@pytest.mark.parametrize(
    ("spec", "sweep_id", "error", "says"),
    [
        pytest.param(
            sweep_of(rates=[0.1, -1.0]), "s", InvalidRequest, f"job 1 ({PEAK}=-1): {PEAK}",
            id="a value",
        ),
        pytest.param(
            sweep_of(adapter={"rank": 4096}), "s", InvalidRequest, "adapter.rank", id="the mesh",
        ),
        pytest.param(
            sweep_of(prompt={"text": "{nothing}"}), "s", InvalidRequest, "prompt", id="the prompt",
        ),
        pytest.param(
            sweep_of(base_model="other"), "s", NotFound, "other", id="the base model",
        ),
        pytest.param(sweep_of(), "S!", InvalidRequest, "sweep_id", id="the id"),
        pytest.param(
            sweep_of(), "s" * 59, InvalidRequest, "sweep_id: 59 characters", id="a long id",
        ),
        pytest.param(
            sweep_of(), "s", Overloaded, "4 jobs would wait, and max_pending_jobs is 3",
            id="the queue",
        ),
        pytest.param(
            sweep_of(rates=[n + 1.0 for n in range(9)]), "s", CapacityExhausted,
            "9 jobs that are compared need as many adapters at once, and the trainers of 'arith' "
            "hold 8 adapters", id="the trainers",
        ),
    ],
)  # fmt: skip
async def test_what_cannot_be_made_is_refused_and_leaves_nothing(
    running, spec, sweep_id, error, says
):
    async with running(max_pending_jobs=3) as coordinator:
        await coordinator.until_served()
        with pytest.raises(error) as caught:
            await coordinator.client.sweeps.create(PROJECT, spec, sweep_id)
        assert says in str(caught.value)
        assert [job async for job in coordinator.client.jobs.list(PROJECT)] == []
        assert [sweep async for sweep in coordinator.client.sweeps.list(PROJECT)] == []


async def test_pages_of_sweeps_hang_together(running, racing):
    racing.gate.clear()
    async with running() as coordinator, channel(f"127.0.0.1:{coordinator.port}") as connected:
        for name in ("a", "b", "c"):
            await coordinator.client.sweeps.create(PROJECT, sweep_of(rates=[1.0]), name)
        stub = SweepServiceStub(connected)
        request = pb.ListSweepsRequest(parent=PROJECT, page_size=2)
        first = await stub.ListSweeps(request)
        request.page_token = first.next_page_token
        second = await stub.ListSweeps(request)
    assert [sweep.name[-1] for sweep in first.sweeps] == ["c", "b"]
    assert [sweep.name[-1] for sweep in second.sweeps] == ["a"]
    assert not second.next_page_token


@pytest.fixture
def rollmesh(monkeypatch):
    """The command line; its status and what it printed."""

    async def rollmesh(coordinator, *arguments):
        out, err = io.StringIO(), io.StringIO()

        def call():
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                pytest.raises(SystemExit) as exited,
            ):
                main()
            return exited.value.code or 0

        monkeypatch.setenv("ROLLMESH_ADDRESS", f"127.0.0.1:{coordinator.port}")
        monkeypatch.setenv("ROLLMESH_PROJECT", "p")
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["rollmesh", "sweep", *arguments])
        return await asyncio.to_thread(call), out.getvalue(), err.getvalue()

    return rollmesh


@pytest.fixture
def sweep_file(tmp_path):
    path = tmp_path / "sweep.yaml"
    values = sweep_of().model_dump(mode="json", exclude_unset=True)
    path.write_text(json.dumps(values))
    return str(path)


async def test_a_sweep_is_watched_to_its_end_in_one_table(running, rollmesh, sweep_file):
    async with running() as coordinator:
        status, out, err = await rollmesh(coordinator, "create", sweep_file, "--id", "s", "--watch")
        assert (status, err) == (0, "")
        *_, title, header, first, second, third, fourth = out.splitlines()
        assert title.startswith(f"{PROJECT}/sweeps/s  ENDED  by reward, the best 1/2 go on at step")
        assert header.split() == ["JOB", "VALUES", "STATE", "STEP", "METRIC", "RUNG", "REASON"]
        assert first.split()[:6] == ["s-1", f"{PEAK}=0.4", "SUCCEEDED", "3/3", "0.4", "2"]
        assert [line.split()[0] for line in (second, third, fourth)] == ["s-2", "s-3", "s-0"]
        assert "reward 0.1 is 4th of 4, the best 2 go on" in fourth

        status, out, _ = await rollmesh(coordinator, "get", "s", "--json", "--watch")
        assert status == 0
        assert json.loads(out)["jobs"][0]["job"] == f"{PROJECT}/jobs/s-1"
        _, out, _ = await rollmesh(coordinator, "list")
        assert out.splitlines()[1].split()[:5] == [
            f"{PROJECT}/sweeps/s",
            "ENDED",
            "4",
            PEAK,
            "arith",
        ]
        _, out, _ = await rollmesh(coordinator, "list", "--json")
        assert [sweep["name"] for sweep in json.loads(out)["sweeps"]] == [f"{PROJECT}/sweeps/s"]


async def test_a_cancelled_sweep_is_told_by_the_exit_status(running, racing, rollmesh, sweep_file):
    racing.gate.clear()
    async with running() as coordinator:
        status, out, _ = await rollmesh(coordinator, "create", sweep_file, "--id", "s", "--json")
        assert (status, json.loads(out)["state"]) == (0, "RUNNING")
        status, out, _ = await rollmesh(coordinator, "cancel", f"{PROJECT}/sweeps/s")
        assert status == 0
        assert out.count("CANCELLED") == 5
        status, _, _ = await rollmesh(coordinator, "get", "s", "--watch")
        assert status == 1


async def test_a_wrong_sweep_is_refused_before_anybody_is_asked(
    running, rollmesh, sweep_file, tmp_path
):
    async with running() as coordinator:
        values = json.loads((tmp_path / "sweep.yaml").read_text())
        values["grid"][0]["path"] = "algorithm.learning_rate.peek"
        (tmp_path / "sweep.yaml").write_text(json.dumps(values))
        status, _, err = await rollmesh(coordinator, "create", sweep_file)
        assert status == 2
        assert "algorithm.learning_rate.peek: unknown key; did you mean 'peak'?" in err
        status, _, err = await rollmesh(coordinator, "get", "nothing")
        assert (status, "there is no projects/p/sweeps/nothing" in err) == (1, True)


async def test_two_sweeps_that_would_wait_for_each_others_adapters_are_not_both_made(
    running, racing
):
    racing.gate.clear()
    async with running() as coordinator:
        await coordinator.until_served()
        sweeps = coordinator.client.sweeps
        made = await asyncio.gather(
            *(sweeps.create(PROJECT, sweep_of([0.1, 0.2, 0.3, 0.4, 0.5]), name) for name in "ab"),
            return_exceptions=True,
        )
        (refused,) = (each for each in made if isinstance(each, Exception))
        (first,) = (each for each in made if not isinstance(each, Exception))
        assert isinstance(refused, CapacityExhausted)
        assert str(refused).endswith(
            "the trainers of 'arith' hold 8 adapters, 5 of which jobs of other sweeps may need "
            "until they end"
        )
        # Of another project too: it is the same trainers. What fits, and what does not wait, may.
        with pytest.raises(CapacityExhausted):
            await sweeps.create("projects/other", sweep_of(), "c")
        await sweeps.create("projects/other", sweep_of([0.1, 0.2, 0.3]), "c")
        await sweeps.create(PROJECT, sweep_of(halving=None), "d")
        await sweeps.cancel(first.name)
        await sweeps.create(PROJECT, sweep_of([0.1, 0.2, 0.3, 0.4, 0.5]), "e")


async def test_a_quota_is_for_all_base_models_of_a_sweep_and_all_sweeps_of_a_project(
    running, racing
):
    racing.gate.clear()
    settings = {
        "default_project": {"max_adapters": 3},
        "base_models": [{"name": "arith"}, {"name": "other"}],
    }
    async with running(**settings) as coordinator:
        sweeps = coordinator.client.sweeps
        models = SweepParameter(path="base_model", values=["arith", "other"])
        rates = SweepParameter(path=PEAK, values=[0.1, 0.2])
        both = SweepSpec(base=spec_of(), grid=[models, rates], halving=HALVING)
        with pytest.raises(CapacityExhausted, match=r"4 jobs .* quota is 3 adapters"):
            await sweeps.create(PROJECT, both, "s")
        await sweeps.create(PROJECT, sweep_of([0.1, 0.2]), "s")
        with pytest.raises(CapacityExhausted, match="2 of which jobs of other sweeps may need"):
            await sweeps.create(PROJECT, sweep_of([0.1, 0.2]), "t")
        await sweeps.create("projects/other", sweep_of([0.1, 0.2]), "t")


async def test_all_copies_of_the_tasks_are_bounded_in_bytes(running, racing, monkeypatch):
    racing.gate.clear()
    tasks = [{"fields": {"question": "é" * 9000, "answer": "1"}}]  # 9,000 characters
    monkeypatch.setattr(core, "MAX_BYTES", 50_000)
    async with running() as coordinator:
        sweeps = coordinator.client.sweeps
        with pytest.raises(InvalidRequest, match="3 jobs, which each keep their tasks"):
            await sweeps.create(PROJECT, sweep_of(RATES[:3], dataset={"tasks": tasks}), "s")
        await sweeps.create(PROJECT, sweep_of(RATES[:2], dataset={"tasks": tasks}), "s")


async def test_tasks_are_checked_again_only_where_they_may_be_others(running, racing, monkeypatch):
    racing.gate.clear()
    checked = []
    real = Jobs._check_tasks

    async def check_tasks(self, project, spec):
        checked.append((spec.seed, spec.sampling.temperature))
        await real(self, project, spec)

    monkeypatch.setattr(Jobs, "_check_tasks", check_tasks)
    async with running() as coordinator:
        temperatures = SweepParameter(path="sampling.temperature", values=[0.5, 1.0])
        curricula = SweepParameter(
            path="curriculum", values=[{"min_reward": 0.1}, {"min_reward": 0.2}]
        )
        seeds = SweepParameter(path="seed", values=[1, 2])
        spec = SweepSpec(base=spec_of(), grid=[temperatures, curricula, seeds])
        await coordinator.client.sweeps.create(PROJECT, spec, "s")
    assert checked == [(1, 0.5), (2, 0.5)]


async def test_adapters_that_a_quota_keeps_apart_are_not_waited_for(running):
    async with running(default_project={"max_adapters": 3}) as coordinator:
        await coordinator.until_served()
        with pytest.raises(CapacityExhausted, match="the project's quota is 3 adapters"):
            await coordinator.client.sweeps.create(PROJECT, sweep_of(), "s")
        # Without comparisons nobody waits for anybody.
        made = await coordinator.client.sweeps.create(PROJECT, sweep_of(halving=None), "s")
        assert len(made.jobs) == 4
        await coordinator.client.sweeps.cancel(made.name)
