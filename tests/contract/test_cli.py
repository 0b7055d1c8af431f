"""The command line against a coordinator that behaves, over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from rollmesh import convert, types
from rollmesh.api.coordinator.v1 import (
    adapter_service_pb2,
    checkpoint_service_pb2,
    job_service_pb2,
)
from rollmesh.api.coordinator.v1.adapter_service_pb2_grpc import (
    AdapterServiceServicer,
    add_AdapterServiceServicer_to_server,
)
from rollmesh.api.coordinator.v1.checkpoint_service_pb2_grpc import (
    CheckpointServiceServicer,
    add_CheckpointServiceServicer_to_server,
)
from rollmesh.api.coordinator.v1.fleet_service_pb2_grpc import (
    FleetServiceServicer,
    add_FleetServiceServicer_to_server,
)
from rollmesh.api.coordinator.v1.job_service_pb2_grpc import (
    JobServiceServicer,
    add_JobServiceServicer_to_server,
)
from rollmesh.cli.__main__ import main
from rollmesh.digest import safetensors_digest
from rollmesh.errors import FailedPrecondition, NotFound
from rollmesh.job import (
    FINAL_STATES,
    EvaluationCompleted,
    Job,
    JobEvent,
    QueueStatus,
    StateChanged,
    StepCompleted,
    Warned,
)
from rollmesh.rpc.server import serving

ROOT = Path(__file__).resolve().parents[2]
JOB_FILE = """\
base_model: arith
dataset: {generator: {name: arithmetic, parameters: {count: 64, split: train}}}
prompt: {messages: [{role: user, content: "{question}"}]}
reward: {function: exact_match, reference: "{answer}"}
stop: {max_steps: 3}
"""
PAGE = 2
WEIGHTS = save({"base_model.model.q_proj.lora_A.weight": np.arange(6, dtype=np.float32)})
STEP = StepCompleted(
    step=1,
    policy_version=1,
    metrics={
        "reward_mean": 0.25,
        "loss": -0.5,
        "kl_sampler": 1e-4,
        "staleness_mean": 0.0,
        "tokens_per_s": 1234.5,
    },
    phases={
        "sample": 0.4,
        "reward": 0.01,
        "wait": 0.5,
        "forward_backward": 0.3,
        "optim_step": 0.1,
        "publish": 0.02,
        "load": 0.08,
        "step": 1.0,
    },
)
EVALUATION = EvaluationCompleted(step=0, reward_mean=0.35, num_tasks=100, duration_s=1.5)
WARNING = Warned(reason="SAMPLER_UNAVAILABLE", message="sampler 127.0.0.1:1 is away;\nothers go on")
RUNNING = StateChanged(from_state="PENDING", to_state="RUNNING")
SUCCEEDED = StateChanged(from_state="RUNNING", to_state="SUCCEEDED", reason="stop.max_steps")


class FakeCoordinator(
    JobServiceServicer, AdapterServiceServicer, CheckpointServiceServicer, FleetServiceServicer
):
    """Keeps jobs and their events; events are told by the test, states follow from them."""

    def __init__(self):
        self.jobs = {}
        self.events = {}
        self.adapters = {}
        self.checkpoints = {}
        self.forked = []
        self.fleet = types.Fleet()
        self.schedule = types.Schedule()
        self.explained = []
        self.weights = WEIGHTS
        self.digest = safetensors_digest(WEIGHTS)
        self.watched_after = []
        self._told = asyncio.Condition()

    async def tell(self, name, *happenings):
        for happening in happenings:
            events = self.events[name]
            events.append(
                JobEvent(number=len(events) + 1, time=1000.0 + len(events), event=happening)
            )
            if isinstance(happening, StateChanged):
                update = {"state": happening.to_state, "state_reason": happening.reason}
                self.jobs[name] = self.jobs[name].model_copy(update=update)
        async with self._told:
            self._told.notify_all()

    def _job(self, name):
        if name not in self.jobs:
            raise NotFound(f"there is no job {name}", resource=name)
        return self.jobs[name]

    async def _move(self, name, state):
        job = self._job(name)
        if job.state in FINAL_STATES:
            raise FailedPrecondition(f"{name} has ended: {job.state}", resource=name)
        await self.tell(name, StateChanged(from_state=job.state, to_state=state))
        return convert.job_to_pb(self.jobs[name])

    async def CreateJob(self, request, context):
        name = f"{request.parent}/jobs/{request.job_id or 'made-up'}"
        self.jobs[name] = Job(
            name=name,
            spec=convert.spec_from_pb(request.spec),
            state="PENDING",
            create_time=1000.0,
            update_time=1000.0,
        )
        self.events[name] = []
        await self.tell(name, StateChanged(from_state=None, to_state="PENDING"))
        return job_service_pb2.CreateJobResponse(job=convert.job_to_pb(self.jobs[name]))

    async def GetJob(self, request, context):
        return job_service_pb2.GetJobResponse(job=convert.job_to_pb(self._job(request.name)))

    async def ListJobs(self, request, context):
        jobs = [job for name, job in self.jobs.items() if name.startswith(request.parent + "/")]
        page, token = page_of(jobs, request.page_token)
        return job_service_pb2.ListJobsResponse(
            jobs=map(convert.job_to_pb, page), next_page_token=token
        )

    async def PauseJob(self, request, context):
        return job_service_pb2.PauseJobResponse(job=await self._move(request.name, "PAUSED"))

    async def ResumeJob(self, request, context):
        return job_service_pb2.ResumeJobResponse(job=await self._move(request.name, "RUNNING"))

    async def CancelJob(self, request, context):
        return job_service_pb2.CancelJobResponse(job=await self._move(request.name, "CANCELLED"))

    async def WatchJob(self, request, context):
        self._job(request.name)
        self.watched_after.append(request.after_event)
        sent = request.after_event
        while True:
            for event in self.events[request.name][sent:]:
                yield job_service_pb2.WatchJobResponse(event=convert.event_to_pb(event))
                sent = event.number
            async with self._told:
                if len(self.events[request.name]) == sent:
                    if self.jobs[request.name].state in FINAL_STATES:
                        return
                    await self._told.wait()

    async def ListAdapters(self, request, context):
        page, token = page_of(list(self.adapters.values()), request.page_token)
        return adapter_service_pb2.ListAdaptersResponse(
            adapters=map(convert.adapter_to_pb, page), next_page_token=token
        )

    async def DeleteAdapter(self, request, context):
        if request.name not in self.adapters:
            raise NotFound(f"there is no adapter {request.name}", resource=request.name)
        del self.adapters[request.name]
        return adapter_service_pb2.DeleteAdapterResponse()

    async def ExportAdapter(self, request, context):
        if request.name not in self.adapters:
            raise NotFound(f"there is no adapter {request.name}", resource=request.name)
        version = request.policy_version if request.HasField("policy_version") else 7
        header = types.AdapterExport(
            request.name, version, "arith", '{"peft_type": "LORA"}', len(WEIGHTS)
        )
        for part in (header, self.weights[:10], self.weights[10:], self.digest):
            if part:
                yield export_part(part)

    async def ForkAdapter(self, request, context):
        self.forked.append(request)
        source = self._checkpoint(request.checkpoint)
        idle_ttl_s = convert.optional_duration_from_pb(request, "idle_ttl")
        made = dataclasses.replace(
            adapter("x"), name=request.name, lora=source.lora, idle_ttl_s=idle_ttl_s
        )
        return adapter_service_pb2.ForkAdapterResponse(adapter=convert.adapter_to_pb(made))

    def _checkpoint(self, name):
        if name not in self.checkpoints:
            raise NotFound(f"there is no {name}", resource=name)
        return self.checkpoints[name]

    async def CreateCheckpoint(self, request, context):
        ttl_s = convert.optional_duration_from_pb(request, "ttl")
        made = types.Checkpoint(
            name=request.name,
            base_model="arith",
            lora=types.LoraConfig(rank=16, alpha=32.0),
            policy_version=7,
            digest=self.digest,
            num_bytes=123456,
            create_time=1000.0,
            expire_time=None if ttl_s is None else 1000.0 + ttl_s,
        )
        self.checkpoints[made.name] = made
        return checkpoint_service_pb2.CreateCheckpointResponse(
            checkpoint=convert.checkpoint_to_pb(made)
        )

    async def GetCheckpoint(self, request, context):
        checkpoint = convert.checkpoint_to_pb(self._checkpoint(request.name))
        return checkpoint_service_pb2.GetCheckpointResponse(checkpoint=checkpoint)

    async def ListCheckpoints(self, request, context):
        found = [each for name, each in self.checkpoints.items() if name.startswith(request.parent)]
        page, token = page_of(found, request.page_token)
        return checkpoint_service_pb2.ListCheckpointsResponse(
            checkpoints=map(convert.checkpoint_to_pb, page), next_page_token=token
        )

    async def DeleteCheckpoint(self, request, context):
        self._checkpoint(request.name)
        del self.checkpoints[request.name]
        return checkpoint_service_pb2.DeleteCheckpointResponse()

    async def ExportCheckpoint(self, request, context):
        self._checkpoint(request.name)
        name = request.name.partition("/checkpoints/")[0]
        header = types.AdapterExport(name, 7, "arith", '{"peft_type": "LORA"}', len(WEIGHTS))
        for part in (header, self.weights[:10], self.weights[10:], self.digest):
            if part:
                yield export_part(part, checkpoint_service_pb2.ExportCheckpointResponse)

    async def GetFleet(self, request, context):
        return convert.fleet_to_pb(self.fleet)

    async def ExplainSchedule(self, request, context):
        self.explained.append((request.project, request.subject))
        return convert.schedule_to_pb(self.schedule)

    async def CreateAdapter(self, request, context):
        raise NotImplementedError

    GetAdapter = PublishAdapter = CreateAdapter


def page_of(items, token):
    start = int(token or 0)
    rest = str(start + PAGE) if len(items) > start + PAGE else ""
    return items[start : start + PAGE], rest


def export_part(part, message=adapter_service_pb2.ExportAdapterResponse):
    match part:
        case types.AdapterExport():
            return message(header=convert.export_header_to_pb(part))
        case bytes():
            return message(chunk=part)
        case str():
            return message(trailer={"digest": part})


def adapter(name):
    return types.Adapter(
        name=f"projects/default/adapters/{name}",
        base_model="arith",
        lora=types.LoraConfig(rank=16, alpha=32.0),
        policy_version=7,
        published_version=7,
        published_digest="ab" * 32,
        next_sequence=15,
        create_time=1000.0,
    )


@contextlib.asynccontextmanager
async def served(coordinator, address="127.0.0.1:0"):
    def register(server):
        add_JobServiceServicer_to_server(coordinator, server)
        add_AdapterServiceServicer_to_server(coordinator, server)
        add_CheckpointServiceServicer_to_server(coordinator, server)
        add_FleetServiceServicer_to_server(coordinator, server)

    async with serving(register, services=[], address=address) as running:
        yield f"127.0.0.1:{running.port}"


@pytest.fixture
async def coordinator(monkeypatch):
    """A coordinator that serves where the command line looks for one."""
    coordinator = FakeCoordinator()
    async with served(coordinator) as address:
        monkeypatch.setenv("ROLLMESH_ADDRESS", address)
        yield coordinator


@pytest.fixture
def job_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB_FILE)
    return str(path)


class Ended:
    """How a run of the command line ended, and what it has printed so far."""

    def __init__(self):
        self.out = io.StringIO()
        self.err = io.StringIO()
        self.status = None

    @property
    def stdout(self):
        return self.out.getvalue()

    @property
    def stderr(self):
        return self.err.getvalue()

    @property
    def json(self):
        return json.loads(self.stdout)

    @property
    def lines(self):
        return self.stdout.splitlines()


@pytest.fixture
def start(monkeypatch):
    """Run the command line in a thread, as its own process would, without paying for a process."""

    async def start(ended, *arguments):
        def call():
            with (
                contextlib.redirect_stdout(ended.out),
                contextlib.redirect_stderr(ended.err),
                pytest.raises(SystemExit) as exited,
            ):
                main()
            ended.status = exited.value.code or 0

        monkeypatch.setattr(sys, "argv", ["rollmesh", *arguments])
        await asyncio.to_thread(call)

    return start


@pytest.fixture
def rollmesh(start):
    async def rollmesh(*arguments):
        ended = Ended()
        await start(ended, *arguments)
        return ended

    return rollmesh


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_job_file_becomes_a_job(coordinator, rollmesh, job_file):
    ended = await rollmesh("job", "create", job_file, "--id", "sums")
    assert ended.status == 0
    assert "projects/default/jobs/sums" in ended.stdout
    job = coordinator.jobs["projects/default/jobs/sums"]
    assert job.spec.stop.max_steps == 3
    assert job.spec.reward.reference == "{answer}"


async def test_options_go_before_the_environment(rollmesh, job_file, monkeypatch):
    async with served(FakeCoordinator()) as address:
        monkeypatch.setenv("ROLLMESH_ADDRESS", "127.0.0.1:1")
        options = ("--address", address, "--project", "team")
        ended = await rollmesh("job", "create", job_file, "--json", *options)
        assert ended.json["name"] == "projects/team/jobs/made-up"
        assert (await rollmesh("job", "get", "made-up", *options)).status == 0
        assert (await rollmesh("job", "get", "made-up", "--address", address)).status == 1


@pytest.mark.parametrize("name", ["sums", "projects/default/jobs/sums"])
@pytest.mark.parametrize(
    ("command", "state"),
    [("get", "RUNNING"), ("pause", "PAUSED"), ("resume", "RUNNING"), ("cancel", "CANCELLED")],
)
async def test_a_job_named_short_or_in_full_is_answered_as_one_json_object(
    coordinator, rollmesh, job_file, name, command, state
):
    await rollmesh("job", "create", job_file, "--id", "sums")
    await coordinator.tell("projects/default/jobs/sums", RUNNING)
    ended = await rollmesh("job", command, name, "--json")
    assert ended.status == 0
    assert ended.json == {**ended.json, "name": "projects/default/jobs/sums", "state": state}
    assert ended.json["spec"]["dataset"]["generator"]["name"] == "arithmetic"
    assert state in (await rollmesh("job", "get", name)).stdout


async def test_a_deleted_adapter_is_gone(coordinator, rollmesh):
    coordinator.adapters["projects/default/adapters/sums"] = adapter("sums")
    coordinator.adapters["projects/default/adapters/kept"] = adapter("kept")
    ended = await rollmesh("adapter", "delete", "sums", "--json")
    assert ended.json == {"deleted": "projects/default/adapters/sums"}
    assert list(coordinator.adapters) == ["projects/default/adapters/kept"]
    assert (await rollmesh("adapter", "delete", "sums")).status == 1


async def test_jobs_and_adapters_of_all_pages_are_listed(coordinator, rollmesh, job_file):
    names = [f"job-{number}" for number in range(2 * PAGE + 1)]
    for name in names:
        await rollmesh("job", "create", job_file, "--id", name)
        coordinator.adapters[name] = adapter(name)
    jobs = (await rollmesh("job", "list", "--json")).json["jobs"]
    assert [job["name"] for job in jobs] == [f"projects/default/jobs/{name}" for name in names]
    shown = (await rollmesh("job", "list")).stdout
    assert all(name in shown for name in names)
    adapters = (await rollmesh("adapter", "list", "--json")).json["adapters"]
    assert [adapter["name"] for adapter in adapters] == [
        f"projects/default/adapters/{name}" for name in names
    ]
    assert adapters[0]["lora"]["rank"] == 16
    shown = (await rollmesh("adapter", "list")).stdout
    assert all(name in shown for name in names)


async def test_the_fleet_is_shown_with_what_is_wrong(coordinator, rollmesh):
    coordinator.fleet = types.Fleet(
        members=(
            types.Member(
                "trainer", "127.0.0.1:1", serving=True, base_model="arith", num_adapters=2
            ),
            types.Member("sampler", "127.0.0.1:2", serving=False, problem="connection refused"),
            types.Member("sampler", "127.0.0.1:3", serving=True, problem="drifts"),
        ),
        num_queued_requests=5,
    )
    fleet = (await rollmesh("fleet", "--json")).json
    assert [member["role"] for member in fleet["members"]] == ["trainer", "sampler", "sampler"]
    assert fleet["members"][1]["problem"] == "connection refused"
    assert fleet["num_queued_requests"] == 5
    shown = (await rollmesh("fleet")).stdout
    assert "127.0.0.1:1" in shown
    assert "connection refused" in " ".join(shown.split())
    assert "serving: drifts" in " ".join(shown.split())


async def test_environments_are_listed_by_the_names_that_jobs_call_them(coordinator, rollmesh):
    coordinator.fleet = types.Fleet(
        members=(
            types.Member("reward", "127.0.0.1:1", serving=True),
            types.Member("environment", "maze", serving=True, num_running=17),
            types.Member("environment", "shop", serving=False, problem="no replica\nanswers"),
        )
    )
    listed = (await rollmesh("environment", "list", "--json")).json["environments"]
    assert [(each["address"], each["num_running"]) for each in listed] == [
        ("maze", 17),
        ("shop", 0),
    ]
    shown = " ".join((await rollmesh("environment", "list")).stdout.split())
    assert "maze serving 17" in shown
    assert "shop not serving: no replica answers 0" in shown
    assert "127.0.0.1:1" not in shown


async def test_a_job_says_what_it_waits_for_because_that_is_away(coordinator, rollmesh, job_file):
    await rollmesh("job", "create", str(job_file), "--id", "j")
    name = "projects/default/jobs/j"
    problems = ["the environment 'maze' is away: no replica answers"]
    coordinator.jobs[name] = coordinator.jobs[name].model_copy(update={"problems": problems})
    assert problems[0] in " ".join((await rollmesh("job", "get", "j")).stdout.split())
    assert (await rollmesh("job", "get", "j", "--json")).json["problems"] == problems


async def test_the_schedule_is_explained_of_a_project_a_job_or_a_request(coordinator, rollmesh):
    coordinator.schedule = types.Schedule(
        waiting=(
            types.Waiting(
                "projects/q/jobs/sums", "MAX_RUNNING_JOBS", "2 jobs\nrun", "the end of one", 3, 5.0
            ),
        ),
        num_waiting=7,
        decisions=(types.Decision(6.0, "projects/q/requests/4", "ASSIGNED", "its turn", "s:1"),),
        shares=(types.Share("arith", 2.0, 12345.0, 3, 8, 0.25),),
        quotas=(
            types.Quota("adapters", 3, None),
            types.Quota("tokens_per_day", 1234567, 2000000),
        ),
    )
    shown = " ".join((await rollmesh("fleet", "explain", "--project", "q")).stdout.split())
    for text in (
        "MAX_RUNNING_JOBS",
        "2 jobs run",
        "1 of 7 that wait",
        "projects/q/requests/4",
        "25.0%",
        "12,345",
        "no bound",
        "2,000,000",
    ):
        assert text in shown
    told = (await rollmesh("fleet", "explain", "sums", "--project", "q", "--json")).json
    assert told["waiting"][0]["rule"] == "MAX_RUNNING_JOBS"
    assert told["quotas"][0] == {"name": "adapters", "used": 3, "allowed": None}
    await rollmesh("fleet", "explain", "projects/r/requests/4")
    assert coordinator.explained == [
        ("projects/q", ""),
        ("projects/q", "projects/q/jobs/sums"),
        ("projects/r", "projects/r/requests/4"),
    ]


async def test_nothing_that_waits_is_said_in_so_many_words(coordinator, rollmesh):
    assert (await rollmesh("fleet", "explain")).stdout == "nothing waits\n"


async def test_a_job_that_waits_is_shown_with_its_place_and_when_it_may_begin(
    coordinator, rollmesh, job_file
):
    await rollmesh("job", "create", str(job_file), "--id", "sums")
    name = "projects/default/jobs/sums"
    queue = QueueStatus(
        position=3, rule="MAX_RUNNING_JOBS", reason="2 jobs run", eta_low_s=90.0, eta_high_s=9000.0
    )
    coordinator.jobs[name] = coordinator.jobs[name].model_copy(update={"queue": queue})
    shown = " ".join((await rollmesh("job", "get", "sums")).stdout.split())
    assert "place 3, in 90s to 2h: MAX_RUNNING_JOBS, 2 jobs run" in shown
    assert (await rollmesh("job", "list", "--json")).json["jobs"][0]["queue"]["eta_low_s"] == 90.0
    listed = (await rollmesh("job", "list")).stdout
    assert "90s" in listed
    assert "2h" in listed


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        pytest.param(("job", "get", "Bad_Id"), 2, "job: 'Bad_Id' is not an id", id="no id"),
        pytest.param(("job", "get", "a/b"), 2, "projects/{project}/jobs/{id}", id="no name"),
        pytest.param(("job", "get", "x", "--project", "P"), 2, "project: 'P'", id="no project"),
        pytest.param(("job", "get", "nobody"), 1, "there is no job", id="no such job"),
        pytest.param(("job", "watch", "nobody"), 1, "there is no job", id="nothing to watch"),
        pytest.param(("job", "create", "gone.yaml"), 2, "gone.yaml: No such file", id="no file"),
        pytest.param(
            ("checkpoint", "show", "sums/Best"), 2, "checkpoint: 'Best' is not an id", id="bad id"
        ),
        pytest.param(
            ("checkpoint", "show", "sums"),
            2,
            "projects/{project}/adapters/{adapter}/checkpoints/{id}",
            id="no checkpoint's name",
        ),
        pytest.param(
            ("checkpoint", "delete", "a/../b"), 2, "checkpoint: 'a/../b'", id="climbing name"
        ),
        pytest.param(("checkpoint", "show", "a/b"), 1, "there is no", id="no such checkpoint"),
        pytest.param(
            ("checkpoint", "create", "a/b", "--ttl", "7w"),
            2,
            "ttl: '7w' is not a duration such as 90s, 30m, 12h or 7d",
            id="no duration",
        ),
        pytest.param(
            ("adapter", "fork", "b", "a/b", "--idle-ttl", "-1s"), 2, "idle-ttl: '-1s'", id="idle"
        ),
        pytest.param(
            ("checkpoint", "export", "a/b", "--output", "out"), 1, "there is no", id="no export"
        ),
        pytest.param(
            ("adapter", "export", "nobody", "--output", "out"), 1, "no adapter", id="no adapter"
        ),
    ],
)
@pytest.mark.usefixtures("coordinator")
async def test_an_error_is_one_line_on_stderr(
    rollmesh, tmp_path, monkeypatch, arguments, status, said
):
    monkeypatch.chdir(tmp_path)
    ended = await rollmesh(*arguments)
    assert ended.status == status
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: ")
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1


async def test_a_misspelt_key_of_a_job_file_is_named_with_the_nearest_one(rollmesh, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB_FILE.replace("max_steps", "max_stepz"))
    ended = await rollmesh("job", "create", str(path))
    assert ended.status == 2
    assert "stop.max_stepz: unknown key; did you mean 'max_steps'?" in ended.stderr


async def test_an_option_before_a_subcommand_that_would_not_see_it_is_refused(
    coordinator, rollmesh
):
    for option in (("--address", "127.0.0.1:1"), ("--json",)):
        refused = await rollmesh("fleet", *option, "explain")
        assert refused.status == 2
        shown = " ".join(refused.stderr.replace("│", " ").split())
        assert f"rollmesh fleet explain {option[0]}" in shown


@pytest.mark.parametrize("arguments", [("job", "get"), ("job", "dance"), ("fleet", "--colour")])
async def test_a_wrong_command_line_is_status_2(rollmesh, arguments):
    ended = await rollmesh(*arguments)
    assert ended.status == 2
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", [("job", "list"), ("job", "watch", "x"), ("fleet",)])
async def test_a_refused_connection_says_which_address_and_how_to_choose_another(rollmesh, command):
    ended = await rollmesh(*command, "--address", "127.0.0.1:1")
    assert ended.status == 1
    assert ended.stderr.startswith("error: ")
    for said in ("127.0.0.1:1", "--address", "ROLLMESH_ADDRESS"):
        assert said in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(("final", "status"), [("SUCCEEDED", 0), ("FAILED", 1), ("CANCELLED", 1)])
async def test_watch_prints_a_line_an_event_and_ends_with_the_status_of_the_job(
    coordinator, rollmesh, job_file, final, status
):
    await rollmesh("job", "create", job_file, "--id", "sums")
    end = StateChanged(from_state="RUNNING", to_state=final, reason="because")
    await coordinator.tell("projects/default/jobs/sums", RUNNING, EVALUATION, STEP, WARNING, end)
    ended = await rollmesh("job", "watch", "sums")
    assert ended.status == status
    assert [line.split(" ", 1)[1] for line in ended.lines] == [
        "state PENDING",
        "state PENDING -> RUNNING",
        "evaluation after step 0: reward 0.350 (100 tasks, 1.5 s)",
        (
            "step 1/3  reward 0.250  loss -0.5  kl 1.00e-04  staleness 0  tokens/s 1,234  1.00 s "
            "(wait 0.50, forward_backward 0.30, optim_step 0.10, publish 0.02, load 0.08)"
        ),
        "warning SAMPLER_UNAVAILABLE: sampler 127.0.0.1:1 is away; others go on",
        f"state RUNNING -> {final}: because",
    ]


async def test_watch_as_json_is_an_object_an_event_and_nan_is_null(coordinator, rollmesh, job_file):
    await rollmesh("job", "create", job_file, "--id", "sums")
    step = STEP.model_copy(update={"metrics": {"loss": float("nan")}})
    await coordinator.tell("projects/default/jobs/sums", RUNNING, step, SUCCEEDED)
    ended = await rollmesh("job", "watch", "sums", "--json")
    events = [json.loads(line) for line in ended.lines]
    assert [event["number"] for event in events] == [1, 2, 3, 4]
    assert [event["event"]["kind"] for event in events] == [
        "state_changed",
        "state_changed",
        "step_completed",
        "state_changed",
    ]
    assert events[2]["event"]["metrics"] == {"loss": None}
    assert events[3]["event"]["to_state"] == "SUCCEEDED"


async def test_create_with_watch_goes_on_to_the_end_of_the_job(coordinator, start, job_file):
    ended = Ended()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(start(ended, "job", "create", job_file, "--watch", "--json"))
        await until(lambda: coordinator.watched_after)
        await coordinator.tell("projects/default/jobs/made-up", RUNNING, STEP, SUCCEEDED)
    first, *events = map(json.loads, ended.lines)
    assert ended.status == 0
    assert first["name"] == "projects/default/jobs/made-up"
    assert [event["number"] for event in events] == [1, 2, 3, 4]


async def test_watch_goes_on_where_it_was_when_the_coordinator_comes_back(
    coordinator, start, job_file, rollmesh, monkeypatch
):
    async with served(coordinator) as address:
        monkeypatch.setenv("ROLLMESH_ADDRESS", address)
        await rollmesh("job", "create", job_file, "--id", "sums")
        name = "projects/default/jobs/sums"
        ended = Ended()
        watching = asyncio.create_task(start(ended, "job", "watch", "sums"))
        await coordinator.tell(name, RUNNING, STEP)
        await until(lambda: "step 1/3" in ended.stdout)
    await until(lambda: "connection lost" in ended.stderr)
    async with served(coordinator, address):
        await coordinator.tell(name, STEP.model_copy(update={"step": 2}), SUCCEEDED)
        await watching
    assert ended.status == 0
    assert [line.split(" ", 2)[1] for line in ended.lines] == [
        "state",
        "state",
        "step",
        "step",
        "state",
    ]
    assert coordinator.watched_after[0] == 0
    assert set(coordinator.watched_after[1:]) == {3}
    assert "trying again in 0.5 s" in ended.stderr


async def test_export_writes_a_peft_folder(coordinator, rollmesh, tmp_path):
    coordinator.adapters["projects/default/adapters/sums"] = adapter("sums")
    folder = tmp_path / "new" / "sums"
    ended = await rollmesh("adapter", "export", "sums", "--output", str(folder), "--json")
    assert ended.status == 0
    assert ended.json == {
        "folder": str(folder),
        "adapter": "projects/default/adapters/sums",
        "policy_version": 7,
        "base_model": "arith",
        "digest": coordinator.digest,
    }
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((folder / "adapter_config.json").read_text()) == {"peft_type": "LORA"}
    (tensor,) = load_file(folder / "adapter_model.safetensors").values()
    assert tensor.tolist() == [0, 1, 2, 3, 4, 5]


async def test_export_takes_the_version_that_is_asked_for(coordinator, rollmesh, tmp_path):
    coordinator.adapters["projects/p/adapters/sums"] = adapter("sums")
    ended = await rollmesh(
        *("adapter", "export", "projects/p/adapters/sums", "--version", "0"),
        *("--output", str(tmp_path / "sums"), "--json"),
    )
    assert ended.json["policy_version"] == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"weights": WEIGHTS[:-1] + b"\xff"}, "digest", id="a bit flipped"),
        pytest.param({"weights": WEIGHTS[:-4]}, "bytes came", id="too few bytes"),
        pytest.param({"weights": b"x" * len(WEIGHTS)}, "digest", id="not a safetensors file"),
        pytest.param({"digest": "ab" * 32}, "digest", id="another version's digest"),
        pytest.param({"digest": ""}, "ended before its last part", id="torn"),
    ],
)
async def test_an_export_that_is_not_what_was_announced_leaves_nothing_behind(
    coordinator, rollmesh, tmp_path, change, said
):
    coordinator.adapters["projects/default/adapters/sums"] = adapter("sums")
    for name, value in change.items():
        setattr(coordinator, name, value)
    ended = await rollmesh("adapter", "export", "sums", "--output", str(tmp_path / "sums"))
    assert ended.status == 1
    assert said in ended.stderr
    assert list(tmp_path.iterdir()) == []


async def test_export_never_writes_over_anything(coordinator, rollmesh, tmp_path):
    coordinator.adapters["projects/default/adapters/sums"] = adapter("sums")
    (tmp_path / "notes.txt").write_text("mine")
    ended = await rollmesh("adapter", "export", "sums", "--output", str(tmp_path))
    assert ended.status == 1
    assert "exists already" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["sums/best", "projects/default/adapters/sums/checkpoints/best"])
@pytest.mark.usefixtures("coordinator")
async def test_a_checkpoint_named_short_or_in_full_is_made_shown_and_deleted(rollmesh, name):
    made = await rollmesh("checkpoint", "create", name, "--json")
    assert made.json["name"] == "projects/default/adapters/sums/checkpoints/best"
    assert made.json["policy_version"] == 7
    assert made.json["expire_time"] is None
    assert (await rollmesh("checkpoint", "show", name, "--json")).json == made.json
    shown = (await rollmesh("checkpoint", "show", name)).stdout
    assert all(said in shown for said in (made.json["name"], "arith", "123,456"))
    assert "Expires" not in shown
    ended = await rollmesh("checkpoint", "delete", name, "--json")
    assert ended.json == {"deleted": made.json["name"]}
    assert (await rollmesh("checkpoint", "show", name)).status == 1


@pytest.mark.parametrize(
    ("ttl", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("7d", 604800)]
)
@pytest.mark.usefixtures("coordinator")
async def test_a_time_to_live_has_a_unit(rollmesh, ttl, seconds):
    made = await rollmesh("checkpoint", "create", "sums/best", "--ttl", ttl, "--json")
    assert made.json["expire_time"] - made.json["create_time"] == seconds
    assert "Expires" in (await rollmesh("checkpoint", "show", "sums/best")).stdout


@pytest.mark.usefixtures("coordinator")
async def test_checkpoints_of_all_pages_are_listed(rollmesh):
    names = [f"sums/c{number}" for number in range(2 * PAGE + 1)]
    for name in (*names, "other/c"):
        await rollmesh("checkpoint", "create", name)
    found = (await rollmesh("checkpoint", "list", "sums", "--json")).json["checkpoints"]
    assert [checkpoint["name"] for checkpoint in found] == [
        f"projects/default/adapters/sums/checkpoints/c{number}" for number in range(2 * PAGE + 1)
    ]
    shown = (await rollmesh("checkpoint", "list", "sums")).stdout
    assert all(f"c{number}" in "".join(shown.split()) for number in range(2 * PAGE + 1))


async def test_a_fork_takes_what_is_asked_of_the_checkpoint(coordinator, rollmesh):
    await rollmesh("checkpoint", "create", "sums/best")
    ended = await rollmesh("adapter", "fork", "more", "sums/best", "--json")
    assert ended.json["name"] == "projects/default/adapters/more"
    assert ended.json["idle_ttl_s"] is None
    ended = await rollmesh(
        *("adapter", "fork", "more", "sums/best", "--with-optimizer", "--idle-ttl", "12h")
    )
    assert "projects/default/adapters/sums/checkpoints/best" in "".join(ended.stdout.split())
    plain, whole = coordinator.forked
    assert plain.request_id != whole.request_id
    assert (plain.with_optimizer, plain.HasField("idle_ttl")) == (False, False)
    assert (whole.with_optimizer, whole.idle_ttl.ToSeconds()) == (True, 43200)


async def test_a_checkpoint_is_exported_as_its_adapter_would_be(coordinator, rollmesh, tmp_path):
    await rollmesh("checkpoint", "create", "sums/best")
    folder = tmp_path / "sums"
    ended = await rollmesh("checkpoint", "export", "sums/best", "--output", str(folder), "--json")
    assert ended.json == {
        "folder": str(folder),
        "adapter": "projects/default/adapters/sums",
        "policy_version": 7,
        "base_model": "arith",
        "digest": coordinator.digest,
    }
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    coordinator.weights = WEIGHTS[:-1] + b"\xff"
    ended = await rollmesh("checkpoint", "export", "sums/best", "--output", str(tmp_path / "bad"))
    assert (ended.status, [path.name for path in tmp_path.iterdir()]) == (1, ["sums"])
    assert "nothing was written" in ended.stderr


async def test_watch_on_a_terminal_draws_a_live_view(coordinator, rollmesh, job_file):
    await rollmesh("job", "create", job_file, "--id", "sums")
    steps = [STEP.model_copy(update={"step": number}) for number in (1, 2, 3)]
    await coordinator.tell(
        "projects/default/jobs/sums", RUNNING, EVALUATION, *steps, WARNING, SUCCEEDED
    )
    screen, status = await on_a_terminal("job", "watch", "sums")
    assert status == 0
    for said in (
        "projects/default/jobs/sums",
        "SUCCEEDED",
        "step 3/3",
        "tokens/s",
        "forward_backward",
        "evaluation after step 0: reward 0.350",
        "warning SAMPLER_UNAVAILABLE",
    ):
        assert said in screen


async def test_help_imports_no_grpc():
    code = (
        "import sys; sys.argv = ['rollmesh', 'job', 'create', '--help']\n"
        "from rollmesh.cli.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "assert 'grpc' not in sys.modules\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    assert await process.wait() == 0


async def on_a_terminal(*arguments):
    """What the command line, as a process of its own, writes to a terminal; and its status."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "rollmesh.cli", *arguments),
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm-256color"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    screen = await asyncio.to_thread(read_all, ours)
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.decode())
    return text, await process.wait()


def read_all(descriptor):
    data = b""
    # Linux says EIO once nobody holds the other end any more.
    with contextlib.suppress(OSError):
        while chunk := os.read(descriptor, 65536):
            data += chunk
    return data
