"""The environments in other languages keep to the contract, as their processes, over the wire."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rollmesh import chat, errors
from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.api.environment.v1.environment_service_pb2_grpc import EnvironmentServiceStub
from rollmesh.environment.conformance import check
from rollmesh.job import load_job_file
from tests.contract.example_environments import EXAMPLES, START_S, built, ended, serving

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(900),  # the first test of a language waits for its compiler
]

SERVICE = "rollmesh.api.environment.v1.EnvironmentService"
Status = grpc.StatusCode
NONSENSE = chat.Message("assistant", "nonsense")


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=EXAMPLES)
async def example(request):
    """Each example in turn."""
    chosen = EXAMPLES[request.param]
    await built(chosen)
    return chosen


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def running(example):
    """One process of it, for all tests that leave it as it was."""
    async with serving(example) as served:
        yield served


def started(**changes: object) -> pb.EpisodeRequest:
    return pb.EpisodeRequest(start=pb.Start(**changes))


def said(content: str = "nonsense", role: str = "assistant") -> pb.EpisodeRequest:
    return pb.EpisodeRequest(action=pb.Message(role=role, content=content))


async def first_task(running, split="train") -> str:
    tasks, _ = await running.client.list_tasks("", split, page_size=1)
    return tasks[0].id


async def whole_split(client, split, page_size=0) -> list[chat.Task]:
    tasks, token = await client.list_tasks("", split, page_size=page_size)
    while token:
        page, token = await client.list_tasks("", split, page_size=page_size, page_token=token)
        assert page
        tasks += page
    return tasks


async def watched(address: str):
    """What grpc.health.v1 says, as it changes."""
    async with grpc.aio.insecure_channel(address) as opened:
        watch = health_pb2_grpc.HealthStub(opened).Watch(health_pb2.HealthCheckRequest())
        try:
            async for response in watch:
                yield health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
        except grpc.aio.AioRpcError as error:
            yield error.code().name


def needs_episodes(example) -> None:
    if not example.plays:
        pytest.skip("single turns only")


async def test_it_describes_itself(running):
    [info] = await running.client.describe()
    assert info.name == running.example.environment
    assert info.version
    assert info.description
    assert info.deterministic
    assert (info.has_score, info.has_episodes) == (not running.example.plays, running.example.plays)
    assert info.limits.max_answer_s == 1
    if running.example.plays:
        assert info.limits.max_concurrent_episodes == 20_000
        assert info.limits.max_turns > 1
    else:
        assert info.limits.max_score_batch == 1024
    assert [split.name for split in info.splits] == ["train", "heldout"]
    assert all(split.num_tasks >= 16 for split in info.splits)
    assert "text" in info.observation_kinds
    assert bool(info.tools) == ("tool" in info.observation_kinds)


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_it_says_that_it_is_well(running, service):
    async with grpc.aio.insecure_channel(running.address) as opened:
        response = await health_pb2_grpc.HealthStub(opened).Check(
            health_pb2.HealthCheckRequest(service=service)
        )
    assert response.status == health_pb2.HealthCheckResponse.SERVING


async def test_every_task_is_listed_once_in_any_pages_and_by_any_process(example, running):
    [info] = await running.client.describe()
    ids: list[str] = []
    texts: list[set[str]] = []
    for split in info.splits:
        tasks = await whole_split(running.client, split.name)
        assert len(tasks) == split.num_tasks
        assert await whole_split(running.client, split.name, page_size=len(tasks) // 9) == tasks
        assert {task.split for task in tasks} == {split.name}
        assert await running.client.get_task("", tasks[-1].id) == tasks[-1]
        ids += [task.id for task in tasks]
        texts.append({str((task.messages, sorted(task.fields.items()))) for task in tasks})
    assert len(set(ids)) == len(ids)
    assert all(0 < len(task_id) <= chat.MAX_TASK_ID for task_id in ids)
    if example.environment != "guess-the-number":  # whose tasks look all the same
        assert not texts[0] & texts[1]
    async with serving(example) as another:
        again = [await whole_split(another.client, split.name) for split in info.splits]
    assert [task.id for tasks in again for task in tasks] == ids


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        pytest.param(
            "ListTasks",
            pb.ListTasksRequest(environment="x", split="train"),
            Status.NOT_FOUND,
            id="environment",
        ),
        pytest.param(
            "ListTasks", pb.ListTasksRequest(split="test"), Status.INVALID_ARGUMENT, id="split"
        ),
        pytest.param("ListTasks", pb.ListTasksRequest(), Status.INVALID_ARGUMENT, id="no split"),
        *(
            pytest.param(
                "ListTasks",
                pb.ListTasksRequest(split="train", page_token=token),
                Status.INVALID_ARGUMENT,
                id=f"page token {token[:20]}",
            )
            for token in (
                "x",
                "train:",
                "train:0",
                "train:01",
                "train:-1",
                "train: 7",
                "heldout:7",
                "train:99999999",
                "train:99999999999999999999",
                "train:7 ",
                "7",
                "x" * 5000,
            )
        ),
        pytest.param(
            "ListTasks",
            pb.ListTasksRequest(split="train", page_size=-1),
            Status.INVALID_ARGUMENT,
            id="page size",
        ),
        pytest.param("GetTask", pb.GetTaskRequest(task_id="no-task"), Status.NOT_FOUND, id="task"),
        pytest.param(
            "GetTask", pb.GetTaskRequest(task_id="train"), Status.NOT_FOUND, id="half a task"
        ),
        pytest.param("GetTask", pb.GetTaskRequest(), Status.NOT_FOUND, id="no task"),
        pytest.param(
            "GetTask", pb.GetTaskRequest(task_id="x" * 5000), Status.NOT_FOUND, id="endless task"
        ),
    ],
)
async def test_what_is_not_to_be_had_is_refused(running, method, request_, code):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(EnvironmentServiceStub(running.channel), method)(request_)
    assert caught.value.code() is code, caught.value.details()
    assert caught.value.details()


@pytest.mark.parametrize(
    ("requests", "code"),
    [
        pytest.param([said()], Status.INVALID_ARGUMENT, id="action before start"),
        pytest.param(
            [started(task_id="T"), started(task_id="T")], Status.INVALID_ARGUMENT, id="second start"
        ),
        pytest.param([pb.EpisodeRequest()], Status.INVALID_ARGUMENT, id="nothing at first"),
        pytest.param(
            [started(task_id="T"), pb.EpisodeRequest()], Status.INVALID_ARGUMENT, id="nothing then"
        ),
        pytest.param([started(task_id="T"), said(role="user")], Status.INVALID_ARGUMENT, id="role"),
        pytest.param([started(task_id="T"), said(role="")], Status.INVALID_ARGUMENT, id="no role"),
        pytest.param([started(task_id="T", seed=-1)], Status.INVALID_ARGUMENT, id="seed"),
        pytest.param([], Status.INVALID_ARGUMENT, id="no start"),
        pytest.param([started(task_id="no-task")], Status.NOT_FOUND, id="task"),
        pytest.param([started(task_id="T", environment="x")], Status.NOT_FOUND, id="environment"),
    ],
)
async def test_an_episode_that_is_not_as_agreed_is_refused(example, running, requests, code):
    needs_episodes(example)
    task = await first_task(running)
    call = EnvironmentServiceStub(running.channel).Episode()
    for request in requests:
        sent = pb.EpisodeRequest()
        sent.CopyFrom(request)
        if sent.start.task_id == "T":
            sent.start.task_id = task
        await call.write(sent)
    await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() is code, caught.value.details()
    assert caught.value.details()


async def test_what_it_does_not_offer_is_unimplemented(example, running):
    stub = EnvironmentServiceStub(running.channel)
    score = pb.ScoreRequest(items=[pb.ScoreItem()])
    call = stub.Score(score) if example.plays else stub.Episode()
    assert await call.code() is Status.UNIMPLEMENTED


@pytest.mark.parametrize("method", ["ListTasks", "GetTask", "Score", "Episode"])
async def test_bytes_that_are_no_message_end_the_call_alone(running, method):
    call = running.channel.unary_unary(f"/{SERVICE}/{method}")(b"\xff\xff\xff\xff\xff")
    with pytest.raises(grpc.aio.AioRpcError):
        await call
    assert await running.client.describe()


async def test_an_episode_is_the_same_for_the_same_seed_and_stays_within_its_turns(
    example, running
):
    needs_episodes(example)
    [info] = await running.client.describe()
    texts = ("1", "up", "cold", "37+58", "nonsense", "äöü\n", "", "x" * 10_000)

    async def play(seed: int) -> list[chat.Response]:
        async with running.client.episode("", await first_task(running), seed=seed) as episode:
            responses = [episode.first]
            while not responses[-1].done:
                text = texts[len(responses) % len(texts)]
                responses.append(await episode.act(chat.Message("assistant", text)))
                assert len(responses) <= info.limits.max_turns + 1
            assert await episode.give_up() is None  # The stream has ended, and well.
        return responses

    seeds = [0, 1, 2, 3, 2**63 - 1]
    played = [await play(seed) for seed in seeds]
    assert [await play(seed) for seed in seeds] == played
    for responses in played:
        assert all(response.observation for response in responses[:-1])
        said = [m.content for response in responses for m in response.observation]
        assert all(len(text) <= 20 and text.isascii() and text == text.lower() for text in said)


async def test_an_episode_without_more_actions_is_told_what_it_was_worth(example, running):
    needs_episodes(example)
    async with running.client.episode("", await first_task(running)) as episode:
        last = await episode.give_up()
    assert (last.done, last.truncated, last.reward) == (True, True, 0)


async def test_it_passes_the_conformance_kit(example):
    options = ("--max-episodes", "1000") if example.plays else ()
    async with serving(example, *options) as running:
        [report] = await check(running.address, answer_s=START_S, pid=running.process.pid)
    told = {verdict.rule: (verdict.outcome, verdict.reason) for verdict in report.verdicts}
    assert report.passed, {
        rule: reason for rule, (outcome, reason) in told.items() if outcome == "failed"
    }
    passed = {rule for rule, (outcome, _) in told.items() if outcome == "passed"}
    assert passed >= {"health", "described", "tasks-listed", "offers-no-more", "alive"}
    if example.plays:
        assert passed >= {"deterministic", "concurrent", "limit-kept", "nothing-leaks"}
    else:
        assert passed >= {"scores-in-order", "score-malformed"}


@pytest.mark.parametrize(
    "how", ["cancelled", "deadline", "connection", "half-close", "refused", "malformed"]
)
async def test_the_place_of_an_episode_is_free_as_soon_as_it_is_over(example, how):
    needs_episodes(example)
    async with serving(example, "--max-episodes", "1") as running:
        task = await first_task(running)
        async with grpc.aio.insecure_channel(running.address) as other:
            timeout = 0.5 if how == "deadline" else None
            start = started(task_id=task).SerializeToString()
            call = other.stream_stream(f"/{SERVICE}/Episode")(timeout=timeout)
            await call.write(start)
            assert isinstance(await call.read(), bytes)
            with pytest.raises(errors.CapacityExhausted):
                async with running.client.episode("", task):
                    pass
            match how:
                case "cancelled":
                    call.cancel()
                case "deadline":
                    assert await call.code() is Status.DEADLINE_EXCEEDED
                case "connection":
                    await other.close()
                case "half-close":
                    await call.done_writing()
                case "refused":
                    await call.write(start)
                case "malformed":
                    await call.write(b"\xff" * 64)
            async with asyncio.timeout(START_S):
                while True:
                    try:
                        async with running.client.episode("", task):
                            break
                    except errors.CapacityExhausted:
                        await asyncio.sleep(0.01)


async def test_told_to_end_it_ends_its_episodes_and_itself(example):
    async with serving(example) as running, contextlib.aclosing(watched(running.address)) as health:
        assert await anext(health) == "SERVING"
        if example.plays:
            call = EnvironmentServiceStub(running.channel).Episode()
            await call.write(started(task_id=await first_task(running)))
            assert isinstance(await call.read(), pb.EpisodeResponse)
        running.terminate()
        if example.plays:
            assert await call.code() is Status.UNAVAILABLE
            assert "stopping" in await call.details()
        assert await anext(health) == "NOT_SERVING"
        assert {said async for said in health} <= {"NOT_SERVING", "UNAVAILABLE", "CANCELLED"}
        assert await asyncio.wait_for(running.process.wait(), START_S) == 0


async def test_it_never_shares_a_port(example, running):
    status, out, err = await ended(example, "--listen", running.address)
    assert (status, out) == (1, "")
    assert running.address in err


@pytest.mark.parametrize("options", [("--listne", "127.0.0.1:0"), ("--listen",)])
async def test_a_misspelt_option_ends_it_with_status_2(example, options):
    status, out, err = await ended(example, *options)
    assert (status, out) == (2, "")
    assert "listen" in err


@pytest.mark.parametrize("environment", EXAMPLES)
async def test_its_job_file_is_one(environment):
    spec = load_job_file(EXAMPLES[environment].folder / "job.yaml")
    assert spec.environment.name == environment
    assert spec.dataset.split == "train"
    assert spec.evaluation.dataset.split == "heldout"
