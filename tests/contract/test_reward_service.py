"""The reward service over gRPC, in process and as the process that an operator starts."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rollmesh.api.reward.v1 import reward_service_pb2 as pb
from rollmesh.api.reward.v1.reward_service_pb2_grpc import (
    RewardServiceStub,
    add_RewardServiceServicer_to_server,
)
from rollmesh.client import RewardClient
from rollmesh.errors import FailedPrecondition, InvalidRequest, Overloaded, Unavailable
from rollmesh.rpc.channel import channel
from rollmesh.rpc.server import serving
from rollmesh.rpc.status import to_error
from rollmesh.types import ScoreItem
from services.reward.functions import FUNCTIONS
from services.reward.registry import Registry
from services.reward.servicer import RewardServicer
from services.reward.workers import Workers

ROOT = Path(__file__).parents[2]
SERVICE = "rollmesh.api.reward.v1.RewardService"


@pytest.fixture
async def reward_channel():
    async with (
        Workers(count=1, item_timeout_s=1.0) as workers,
        serving(
            lambda server: add_RewardServiceServicer_to_server(
                RewardServicer(Registry(FUNCTIONS, workers, max_batches=8)), server
            ),
            services=[SERVICE],
        ) as running,
        channel(f"127.0.0.1:{running.port}") as opened,
    ):
        yield opened


@pytest.fixture
def client(reward_channel):
    return RewardClient(reward_channel)


@pytest.mark.parametrize(
    ("function", "parameters", "item", "reward"),
    [
        ("exact_match", {"ignore_case": True}, ScoreItem("Yes", "yes"), 1.0),
        ("numeric_match", {"tolerance": 0.5}, ScoreItem("about 7.4", "7"), 1.0),
        ("math_match", {}, ScoreItem(r"\boxed{\frac12}", "0.5"), 1.0),
        ("regex_match", {"pattern": "^a"}, ScoreItem("ba"), 0.0),
        ("length", {"target": 4}, ScoreItem("abc"), 0.75),
    ],
)
async def test_every_function_scores_over_the_wire(client, function, parameters, item, reward):
    assert await client.score(function, parameters, [item]) == [reward]


async def test_the_functions_and_their_schemas_are_listed(client):
    infos = await client.list_functions()
    assert [info.name for info in infos] == sorted(FUNCTIONS)
    assert all(json.loads(info.parameters_schema_json)["type"] == "object" for info in infos)


async def test_a_batch_is_refused_by_the_name_of_what_is_wrong_with_it(client):
    with pytest.raises(InvalidRequest, match="did you mean 'exact_match'") as caught:
        await client.score("exact_mach", {}, [ScoreItem("x")])
    assert caught.value.context["field"] == "function"


async def test_a_parameter_that_is_not_a_number_is_the_callers_error(reward_channel):
    parameters = Struct()
    parameters["tolerance"] = float("nan")
    request = pb.ScoreRequest(
        function="numeric_match",
        parameters=parameters,
        items=[pb.ScoreItem(completion="7", reference="7")],
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await RewardServiceStub(reward_channel).Score(request)
    assert isinstance(to_error(caught.value), InvalidRequest)


async def test_an_exploding_batch_ends_and_others_are_scored_meanwhile(client):
    exploding = asyncio.ensure_future(
        client.score("regex_match", {"pattern": "(a+)+$"}, [ScoreItem("a" * 60 + "b")])
    )
    assert await client.score("exact_match", {}, [ScoreItem("7", "7")]) == [1.0]
    with pytest.raises(InvalidRequest, match=r"items\[0\].*processor time"):
        await exploding


async def start(config: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.reward",
        "--config",
        str(config),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_a_mistake_in_the_configuration_is_one_line_and_exit_status_2(tmp_path):
    config = tmp_path / "reward.yaml"
    config.write_text("lisen: 127.0.0.1:0\n")
    process = await start(config)
    _, said = await process.communicate()
    assert process.returncode == 2
    assert said.decode() == f"{config}: lisen: unknown key; did you mean 'listen'?\n"


async def test_a_port_that_is_taken_is_one_line_and_exit_status_1(tmp_path):
    config = tmp_path / "reward.yaml"
    async with serving(lambda _: None, services=[]) as other:
        config.write_text(f"listen: 127.0.0.1:{other.port}\n")
        process = await start(config)
        _, said = await process.communicate()
    assert process.returncode == 1
    assert said.decode().splitlines()[-1].startswith(f"cannot listen at 127.0.0.1:{other.port}: ")
    assert "Traceback" not in said.decode()


async def test_the_process_serves_then_drains_on_sigterm_and_ends_well(tmp_path):
    config = tmp_path / "reward.yaml"
    config.write_text("listen: 127.0.0.1:0\ndrain_s: 60\n")
    process = await start(config)
    try:
        line = json.loads(await process.stderr.readline())
        assert line["message"] == "serving"
        async with channel(f"127.0.0.1:{line['port']}") as opened:
            for service in ("", SERVICE):
                health = await health_pb2_grpc.HealthStub(opened).Check(
                    health_pb2.HealthCheckRequest(service=service)
                )
                assert health.status == health_pb2.HealthCheckResponse.SERVING
            client = RewardClient(opened)
            # Seconds of work, and then a small call to know that it has begun when the end comes.
            work = asyncio.ensure_future(
                client.score("math_match", {}, [ScoreItem("1/2", "0.5")] * 400)
            )
            await client.score("math_match", {}, [ScoreItem("1/2", "0.5")])
            process.terminate()
            assert await work == [1.0] * 400
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


JUDGE = {"rubric": "Is it right?"}


async def test_scores_and_questions_cross_the_wire_while_items_wait(client):
    asked = []

    async def judge(question):
        asked.append(question)
        while len(asked) < 3:  # All are asked before any is answered.
            await asyncio.sleep(0)
        return f"Score: {question.number}"

    parameters = {
        "parts": [
            {"function": "regex_match", "parameters": {"pattern": "7"}, "name": "seven"},
            {
                "function": "llm_judge",
                "parameters": JUDGE | {"adapter": "projects/p/adapters/a", "max_tokens": 9},
                "name": "judge",
            },
        ]
    }
    items = [ScoreItem(text, prompt="3 + 4") for text in ("7", "8", "77")]
    scores = await client.score_each("weighted", parameters, items, judge=judge)
    assert [score.index for score in scores] == [0, 1, 2]
    assert [score.rewards["seven"] for score in scores] == [1, 0, 1]
    assert sorted(score.rewards["judge"] for score in scores) == [0.1, 0.2, 0.3]
    assert all(score.reward == sum(score.rewards.values()) for score in scores)
    assert all(score.feedback.startswith("judge: Score: ") for score in scores)
    assert {(q.adapter, q.policy_version, q.max_tokens) for q in asked} == {
        ("projects/p/adapters/a", None, 9)
    }
    assert all("3 + 4" in question.messages[0].content for question in asked)


async def test_a_judge_that_fails_fails_the_call_as_it_did(client):
    async def judge(question):
        raise Unavailable("no sampler")

    with pytest.raises(Unavailable, match="no sampler"):
        await client.score_each("llm_judge", JUDGE, [ScoreItem("x")], judge=judge)


async def test_a_call_that_ends_while_answers_are_written_fails_as_the_service_says(client):
    delays = itertools.cycle(range(10))

    async def judge(question):
        if question.number == 1:
            return "nonsense"
        await asyncio.sleep(0.0005 * next(delays))
        return "Score: 3"

    items = [ScoreItem("x")] * 16
    for _ in range(120):
        with pytest.raises(FailedPrecondition, match="the judge gave no score"):
            await client.score_each("llm_judge", JUDGE, items, judge=judge)


async def test_score_refuses_who_asks_a_judge(client):
    with pytest.raises(FailedPrecondition, match="ScoreEach"):
        await client.score("llm_judge", JUDGE, [ScoreItem("x")])
    infos = {info.name: info for info in await client.list_functions()}
    assert infos["llm_judge"].asks_judge
    assert not infos["weighted"].asks_judge


def batch(function, parameters, *completions):
    struct = Struct()
    struct.update(parameters)
    items = [pb.ScoreItem(completion=text, reference="7") for text in completions]
    request = pb.ScoreRequest(function=function, parameters=struct, items=items)
    return pb.ScoreEachRequest(batch=request)


@pytest.mark.parametrize(
    ("requests", "match"),
    [
        pytest.param([pb.ScoreEachRequest()], "neither batch nor answer", id="nothing"),
        pytest.param(
            [pb.ScoreEachRequest(answer=pb.Answer(question=1))],
            "before there is",
            id="answer first",
        ),
        pytest.param([batch("llm_judge", JUDGE, "x")] * 2, "a second one", id="two batches"),
        pytest.param(
            [batch("llm_judge", JUDGE, "x"), pb.ScoreEachRequest(answer=pb.Answer(question=9))],
            "9 was not asked",
            id="an answer to nothing",
        ),
        pytest.param([batch("llm_judge", JUDGE, "x")], "none to question 1", id="no answer"),
        pytest.param([], "ended without one", id="no request"),
        pytest.param(
            [batch("numeric_match", {"tolerance": float("nan")}, "7")], "finite", id="NaN"
        ),
    ],
)
async def test_what_does_not_belong_on_a_call_is_invalid(reward_channel, requests, match):
    call = RewardServiceStub(reward_channel).ScoreEach()
    for request in requests:
        await call.write(request)
    await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    error = to_error(caught.value)
    assert isinstance(error, InvalidRequest)
    assert match in str(error)


async def test_a_call_that_fails_while_something_is_said_ends_all_the_same(reward_channel):
    for _ in range(100):
        call = RewardServiceStub(reward_channel).ScoreEach()
        # The second is wrong at the moment at which the first one's question is said.
        await call.write(batch("llm_judge", JUDGE, "x"))
        await call.write(batch("llm_judge", JUDGE, "x"))
        with pytest.raises(grpc.aio.AioRpcError, match="a second one"):
            async for _ in call:
                pass


async def test_a_caller_that_goes_away_leaves_no_batch(reward_channel, client):
    for _ in range(10):  # More than max_batches.
        call = RewardServiceStub(reward_channel).ScoreEach()
        await call.write(batch("llm_judge", JUDGE, "x", "y"))
        assert (await call.read()).HasField("question")
        call.cancel()
    # Each is over when the service has heard of it, which it does in its own time.
    async with asyncio.timeout(60):
        while True:
            try:
                await asyncio.gather(
                    *(client.score("math_match", {}, [ScoreItem("7", "7")]) for _ in range(8))
                )
            except Overloaded:
                continue
            break


async def test_a_call_that_is_left_open_ends_with_its_batch(reward_channel):
    call = RewardServiceStub(reward_channel).ScoreEach()
    await call.write(batch("exact_match", {}, "7", "8"))
    scores = [response.score async for response in call]
    assert [(score.index, score.reward) for score in scores] == [(0, 1), (1, 0)]
