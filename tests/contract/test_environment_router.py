"""The reward service between callers and environments: real gRPC on both sides."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest

from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.api.environment.v1.environment_service_pb2_grpc import EnvironmentServiceStub
from rollmesh.chat import Message, Task
from rollmesh.errors import (
    EnvironmentFailed,
    EnvironmentTimeout,
    EnvironmentUnavailable,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
    Unimplemented,
)
from rollmesh.rpc.status import to_error, to_status
from tests.fakes.games import Game, served, served_plainly
from tests.fakes.routing import answers, environment, routed, say, until


@contextlib.asynccontextmanager
async def playing(game=None, **changes):
    """One environment, and what reaches it through the router."""
    game = game or Game()
    async with served(game) as there, routed(environment(there.port, **changes)) as world:
        await world.serves()
        world.game = game
        yield world


@pytest.fixture
async def world():
    async with playing() as made:
        yield made


# --- what goes through ----------------------------------------------------------------------------


async def test_an_environment_is_described_by_the_name_that_jobs_use_with_what_we_take():
    first, second = Game(max_concurrent_episodes=4, max_score_batch=2), Game()
    async with (
        served(first) as one,
        served(second) as other,
        routed(
            environment(one.port, name="a-game", max_concurrent=3),
            environment(other.port, name="another", max_concurrent=7),
        ) as world,
    ):
        await world.serves("a-game")
        await world.serves("another")
        infos = await world.client.describe()
    assert [info.name for info in infos] == ["a-game", "another"]
    assert [info.limits.max_concurrent_episodes for info in infos] == [3, 7]
    assert [info.limits.max_score_batch for info in infos] == [0, 0]
    assert all(info.version == "1" and info.has_episodes for info in infos)


async def test_tasks_are_paged_as_the_environment_pages_them(world):
    found, token = [], ""
    while True:
        tasks, token = await world.client.list_tasks("game", "train", page_token=token)
        found += tasks
        if not token:
            break
    assert [task.id for task in found] == [f"t{number}" for number in range(8)]
    assert len((await world.client.list_tasks("game", "train", page_size=5))[0]) == 5
    assert await world.client.get_task("", "t3") == Task("t3", "train")


async def test_answers_are_scored_in_their_order_in_batches_that_run_at_once():
    async with playing(Game(max_score_batch=2)) as world:
        texts = ["hang", "a", "hang", "bb", "ccc"]
        scoring = asyncio.ensure_future(world.client.score("game", answers(*texts)))
        await until(lambda: world.game.scoring == 2)
        world.game.go_on.set()
        assert [each.reward for each in await scoring] == [4.0, 1.0, 4.0, 2.0, 3.0]
        assert world.game.batches == [2, 2, 1]


async def test_a_batch_is_cut_up_so_that_a_server_with_grpcs_own_limits_takes_it():
    game = Game()
    async with (
        served_plainly(game) as port,
        routed(environment(port, max_concurrent=1)) as world,
    ):
        await world.serves()
        texts = [str(number % 10) * (10_000 + number) for number in range(512)]
        scored = await world.client.score("game", answers(*texts))
        assert [each.reward for each in scored] == [len(text) for text in texts]
        assert sum(game.batches) == 512
        assert 2 <= len(game.batches) <= 3
        assert game.most_scoring == 1
        with pytest.raises(
            InvalidRequest, match=r"items\[1\]: an answer to task 't1' has, with"
        ) as raised:
            await world.client.score("game", answers("a", "ß" * 1_600_000))
        assert raised.value.context["field"] == "items[1]"
        assert sum(game.batches) == 512


async def test_a_page_of_tasks_may_be_larger_than_grpcs_own_limit():
    game = Game(text="x" * 2_000_000)
    async with served_plainly(game) as port, routed(environment(port)) as world:
        await world.serves()
        tasks, _ = await world.client.list_tasks("game", "train")
        assert [len(task.fields["text"]) for task in tasks] == [2_000_000] * 3


async def test_what_is_too_large_for_us_is_the_environments_failure_and_not_tried_again():
    game = Game(text="x" * 23_000_000)
    async with served_plainly(game) as port, routed(environment(port)) as world:
        await world.serves()
        with pytest.raises(EnvironmentFailed, match="larger than max"):
            await world.client.list_tasks("game", "train")
        assert game.tried["ListTasks"] == 1


async def test_an_item_that_cannot_be_scored_fails_alone(world):
    good, failed, odd = await world.client.score("game", answers("four", "failure", "nan"))
    assert (good.reward, good.failure) == (4.0, "")
    assert failed.failure == "cannot be scored"
    assert "not finite" in odd.failure


async def test_an_episode_goes_back_and_forth_until_it_is_done(world):
    async with world.client.episode("game", "t0", seed=7) as episode:
        assert episode.first.observation == (Message("user", "seed 7"),)
        assert (await episode.act(say("hello"))).observation[0].content == "you said hello"
        assert world.status().num_running == 1
        last = await episode.act(say("done"))
        assert (last.done, last.reward) == (True, 1.0)
        await episode.end()
    assert world.game.open == 0
    await until(lambda: world.status().num_running == 0)


@pytest.mark.parametrize(("task", "worth"), [("t0", 0.5), ("shrug", None)])
async def test_an_episode_that_is_given_up_is_worth_what_the_environment_says(world, task, worth):
    async with world.client.episode("game", task) as episode:
        last = await episode.give_up()
        assert (last.reward if last else None) == worth
    await until(lambda: world.game.open == world.status().num_running == 0)


async def test_an_episode_that_is_done_ends_though_the_environment_holds_its_stream(world):
    async with world.client.episode("game", "stay") as episode:
        assert (await episode.act(say("done"))).done
        await episode.end()
    await until(lambda: world.game.open == world.status().num_running == 0)


# --- failures -------------------------------------------------------------------------------------


async def begin(world, task):
    async with world.client.episode("game", task):
        pass


async def act(world, action):
    async with world.client.episode("game", "t0") as episode:
        await episode.act(say(action))


async def act_and_wait(world, action):
    async with world.client.episode("game", "t0") as episode:
        await episode.act(say(action))
        await episode.end()


async def give_up(world, task):
    async with world.client.episode("game", task) as episode:
        await episode.give_up()


async def score(world, answer):
    await world.client.score("game", answers(answer))


async def get(world, task):
    await world.client.get_task("game", task)


async def list_page(world, token):
    await world.client.list_tasks("game", "train", page_token=token)


@pytest.mark.parametrize(
    ("call", "word", "error"),
    [
        (begin, "status:INTERNAL", EnvironmentFailed),
        (begin, "status:UNKNOWN", EnvironmentFailed),
        (begin, "status:INVALID_ARGUMENT", EnvironmentFailed),
        (begin, "status:PERMISSION_DENIED", EnvironmentFailed),
        (begin, "status:NOT_FOUND", NotFound),
        (begin, "status:UNIMPLEMENTED", Unimplemented),
        (begin, "status:UNAVAILABLE", EnvironmentUnavailable),
        (begin, "status:DEADLINE_EXCEEDED", EnvironmentTimeout),
        (begin, "status:RESOURCE_EXHAUSTED", Overloaded),
        (begin, "hang", EnvironmentTimeout),
        (act, "status:INTERNAL", EnvironmentFailed),
        (act, "status:NOT_FOUND", EnvironmentFailed),
        (act, "status:INVALID_ARGUMENT", EnvironmentFailed),
        (act, "status:UNAVAILABLE", EnvironmentUnavailable),
        (act, "hang", EnvironmentTimeout),
        (act, "leave", EnvironmentFailed),
        (act_and_wait, "leave soon", EnvironmentFailed),
        (act, "nan", EnvironmentFailed),
        (act, "nothing", EnvironmentFailed),
        (give_up, "goes on", EnvironmentFailed),
        (score, "status:INTERNAL", EnvironmentFailed),
        (score, "status:INVALID_ARGUMENT", EnvironmentFailed),
        (score, "status:NOT_FOUND", NotFound),
        (score, "status:UNAVAILABLE", EnvironmentUnavailable),
        (score, "status:RESOURCE_EXHAUSTED", Overloaded),
        (score, "too few", EnvironmentFailed),
        (score, "hang", EnvironmentTimeout),
        (get, "nowhere", NotFound),
        (get, "status:INTERNAL", EnvironmentFailed),
        (get, "status:UNAVAILABLE", EnvironmentUnavailable),
        (list_page, "mine", InvalidRequest),
    ],
)
async def test_a_failure_says_whose_it_is(call, word, error):
    quick = {"answer_timeout_s": 0.3, "start_timeout_s": 0.3, "patience_s": 0.3}
    async with playing(**quick) as world:
        with pytest.raises(error) as raised:
            await call(world, word)
        assert type(raised.value) is error
        assert raised.value.context["environment"] == "game"
        world.game.go_on.set()
        await until(lambda: world.game.open == world.status().num_running == 0)


@pytest.mark.parametrize(
    ("call", "word"), [(begin, "once:UNAVAILABLE"), (score, "once:UNAVAILABLE")]
)
async def test_what_was_unavailable_for_a_moment_is_tried_again(world, call, word):
    await call(world, word)
    assert world.game.tried[word] == 2


class Insolent(Game):
    """Tells of its failures what would break whoever takes it for an argument."""

    async def GetTask(self, request, context):
        error = NotFound("no")
        error.context = {"message": "x", "self": "y", "field": "task_id", "odd": "z" * 1000}
        await context.abort_with_status(to_status(error))


async def test_of_what_an_environment_says_of_a_failure_only_what_is_known_goes_on():
    async with playing(Insolent()) as world:
        with pytest.raises(NotFound) as raised:
            await get(world, "t0")
        assert raised.value.context.keys() == {"environment", "replica", "field"}
        assert raised.value.context["field"] == "task_id"


async def test_an_episode_that_has_begun_is_not_begun_again(world):
    with pytest.raises(EnvironmentUnavailable):
        await act(world, "once:UNAVAILABLE")
    assert world.game.begun == 1


async def test_a_call_that_names_no_environment_of_ours_is_told_which_there_are(world):
    with pytest.raises(NotFound, match="did you mean 'game'") as raised:
        await world.client.get_task("gane", "t0")
    assert raised.value.context["allowed"] == "game"


async def test_with_several_environments_one_has_to_be_named():
    async with served(Game()) as there:
        port = there.port
        async with routed(environment(port), environment(port, name="other")) as world:
            with pytest.raises(InvalidRequest, match="one of game, other"):
                await world.client.get_task("", "t0")


async def test_a_split_that_does_not_exist_is_refused_with_those_that_do(world):
    with pytest.raises(InvalidRequest) as raised:
        await world.client.list_tasks("game", "test")
    assert raised.value.context["allowed"] == "train"


@pytest.mark.parametrize(
    ("can", "call", "word"),
    [("has_score", begin, "t0"), ("has_episodes", score, "a")],
)
async def test_what_an_environment_does_not_offer_is_not_asked_of_it(can, call, word):
    other = {"has_score": "has_episodes", "has_episodes": "has_score"}[can]
    async with playing(Game(**{other: False})) as world:
        with pytest.raises(Unimplemented):
            await call(world, word)
        assert not world.game.tried[word]


START = pb.EpisodeRequest(start=pb.Start(environment="game", task_id="t0"))


@pytest.mark.parametrize(
    ("requests", "field"),
    [
        pytest.param([], "request", id="nothing"),
        pytest.param([pb.EpisodeRequest()], "request", id="neither"),
        pytest.param(
            [pb.EpisodeRequest(action=pb.Message(role="assistant"))], "request", id="no start"
        ),
        pytest.param([START, START], "start", id="two starts"),
        pytest.param(
            [START, pb.EpisodeRequest(action=pb.Message(role="user"))], "action.role", id="a user's"
        ),
        pytest.param(
            [START, pb.EpisodeRequest(action=pb.Message(role="x"))], "action.role", id="nobody's"
        ),
        pytest.param(
            [pb.EpisodeRequest(start=pb.Start(environment="game", task_id="t0", seed=-1))],
            "start.seed",
            id="a negative seed",
        ),
    ],
)
async def test_what_is_no_episode_is_the_callers_mistake_and_leaves_nothing(world, requests, field):
    call = EnvironmentServiceStub(world.channel).Episode(iter(requests))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in call:
            pass
    error = to_error(raised.value)
    assert type(error) is InvalidRequest
    assert error.context["field"] == field
    await until(lambda: world.game.open == world.status().num_running == 0)


@pytest.mark.parametrize("task", ["", "t" * 256])
async def test_a_task_that_no_environment_can_have_is_not_found(world, task):
    with pytest.raises(NotFound, match="task_id"):
        await begin(world, task)
    assert world.game.begun == 0


async def test_a_batch_without_items_is_refused(world):
    with pytest.raises(InvalidRequest, match="at least one"):
        await world.client.score("game", [])


# --- either side leaves ---------------------------------------------------------------------------


@pytest.mark.parametrize("action", [None, "hang"])
async def test_when_the_caller_leaves_the_environment_is_told(world, action):
    async with world.client.episode("game", "t0") as episode:
        working = asyncio.ensure_future(episode.act(say(action))) if action else None
        await until(lambda: world.game.open == 1 and (not action or world.game.tried[action]))
        if working:
            working.cancel()
    await until(lambda: world.game.open == world.status().num_running == 0)


@pytest.mark.parametrize("action", ["leave soon", "leave later"])
async def test_when_the_environment_leaves_a_caller_that_thinks_is_told(world, action):
    async with world.client.episode("game", "t0") as episode:
        ended = asyncio.Event()
        episode.on_end(ended.set)
        assert (await episode.act(say(action))).observation
        # By now the router waits for what we do next.
        await world.client.describe()
        world.game.go_on.set()
        await ended.wait()
        with pytest.raises(EnvironmentFailed, match="before that was done"):
            await episode.act(say("too late"))


async def test_a_call_whose_deadline_passes_is_over_at_the_environment_too(world):
    call = EnvironmentServiceStub(world.channel).Episode(timeout=0.5)
    await call.write(START)
    await call.read()
    assert world.game.open == 1
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: world.game.open == world.status().num_running == 0)


async def test_a_service_that_ends_takes_nothing_more_and_ends_episodes_with_a_word(world):
    async with world.client.episode("game", "t0") as episode:
        world.router.end(within_s=60)
        with pytest.raises(Unavailable, match="reward service is ending"):
            await score(world, "a")
        assert (await episode.act(say("still here"))).observation
        ended = asyncio.Event()
        episode.on_end(ended.set)
        world.router.end(within_s=0)
        await ended.wait()
        with pytest.raises(Unavailable, match="reward service is ending"):
            await episode.act(say("gone"))
    await until(lambda: world.game.open == 0)
