"""What a server's environments do with episodes and batches, without gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import threading
import time

import pytest

from rollmesh.chat import Answered, Message, Response, Scored, Task, Tool
from rollmesh.environment import Environment, Episode, NoMoreActions
from rollmesh.environment.episode import Start
from rollmesh.environment.host import Host
from rollmesh.errors import (
    EnvironmentFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unimplemented,
)

TASKS = {"train": ["abc", "xyz"]}


def said(content):
    return Message("assistant", content)


class Client:
    """The other side of an episode: says `script`, then that no more comes, or nothing at all."""

    def __init__(self, *script, ends=True):
        self.script = list(script)
        self.ends = ends
        self.heard = []
        self.waiting = asyncio.Event()

    async def receive(self):
        if self.script:
            said = self.script.pop(0)
            if isinstance(said, Exception):
                raise said
            return said
        if self.ends:
            return None
        self.waiting.set()
        return await asyncio.Event().wait()

    async def send(self, response):
        self.heard.append(response)


def start(task_id="train-0", seed=0, environment=""):
    return Start(environment, task_id, seed)


def made(play=None, *, score=None, max_turns=4, name="game", **options):
    environment = Environment(name, version="1", tasks=TASKS, **options)
    if play:
        environment.episode(max_turns=max_turns)(play)
    if score:
        environment.score(score)
    return environment


def hosting(*environments):
    return Host(environments)


async def play(environment, *script, seed=0):
    client = Client(start(seed=seed), *script)
    async with hosting(environment) as host:
        await host.episode(client)
    return client.heard


def user(text):
    return (Message("user", text),)


# --- episodes ------------------------------------------------------------------------------------


async def echo(episode: Episode) -> float:
    """Asks until it hears "end"; each action is worth its length."""
    action = await episode.ask(episode.task.messages)
    while action.content != "end":
        action = await episode.ask(
            f"not {action.content}", reward=len(action.content), info={"n": str(episode.num_turns)}
        )
    return 10


async def test_an_episode_is_straight_line_code():
    heard = await play(made(echo), said("no"), said("well"), said("end"))
    assert heard == [
        Response(user("abc")),
        Response(user("not no"), 2.0, info={"n": "1"}),
        Response(user("not well"), 4.0, info={"n": "2"}),
        Response(reward=10.0, done=True),
    ]


async def test_the_last_action_that_is_allowed_ends_it_with_all_that_it_was_worth():
    heard = await play(made(echo, max_turns=2), said("no"), said("well"), said("end"))
    assert heard[1:] == [
        Response(user("not no"), 2.0, info={"n": "1"}),
        Response(reward=4.0, info={"n": "2"}, done=True, truncated=True),
    ]


async def test_a_client_without_more_actions_ends_it():
    heard = await play(made(echo), said("no"))
    assert heard[1:] == [
        Response(user("not no"), 2.0, info={"n": "1"}),
        Response(done=True, truncated=True),
    ]


@pytest.mark.parametrize("max_turns", [2, 9])
async def test_who_hears_that_no_more_comes_may_say_what_it_was_worth(max_turns):
    async def keep(episode):
        try:
            while True:
                await episode.ask("more", reward=1, rewards={"step": 1})
        except NoMoreActions:
            with pytest.raises(NoMoreActions):
                await episode.ask("again", reward=100)
            return Scored(0.5, {"partial": 0.5}, feedback="cut off")

    heard = await play(made(keep, max_turns=max_turns), said("1"), said("2"))
    # The ask that was refused for max_turns told nobody what the action before was worth.
    unsent = 1.0 if max_turns == 2 else 0.0
    rewards = {"step": 1, "partial": 0.5} if unsent else {"partial": 0.5}
    assert heard[-1] == Response(
        (), 0.5 + unsent, rewards, done=True, truncated=True, info={"feedback": "cut off"}
    )
    assert sum(response.reward for response in heard) == 3.5


@pytest.mark.parametrize(
    ("given", "response"),
    [
        (None, Response(done=True)),
        (1, Response(reward=1.0, done=True)),
        (True, Response(reward=1.0, done=True)),
        (Scored(0.5, {"a": 1.0}), Response((), 0.5, {"a": 1.0}, done=True)),
        (
            Response(user("bye"), 0.5, truncated=True, info={"a": "b"}),
            Response(user("bye"), 0.5, done=True, truncated=True, info={"a": "b"}),
        ),
    ],
)
async def test_what_an_episode_returns_is_its_last_response(given, response):
    async def once(episode):
        await episode.ask("?")
        return given

    assert (await play(made(once), said("x")))[-1] == response


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["ask", "part", "last", "last part"])
async def test_a_reward_that_is_not_finite_is_a_failure(value, where):
    async def bad(episode):
        await episode.ask("?")
        if where == "ask":
            await episode.ask("?", reward=value)
        if where == "part":
            await episode.ask("?", rewards={"part": value})
        return value if where == "last" else Scored(0.0, {"part": value})

    with pytest.raises(EnvironmentFailed, match="not finite"):
        await play(made(bad), said("x"), said("y"))


async def test_a_failure_that_an_episode_returns_is_one():
    async def fail(episode):
        return Scored(failure="the engine is away")

    with pytest.raises(EnvironmentFailed, match="the engine is away"):
        await play(made(fail))


@pytest.mark.parametrize("observation", [(), [], said("x"), [Message("user", "a"), said("x")]])
async def test_an_observation_that_is_none_is_the_authors_mistake(observation):
    async def bad(episode):
        await episode.ask(observation)

    with pytest.raises(ValueError, match="observation"):
        await play(made(bad), said("x"))


async def test_what_an_author_raises_comes_out():
    async def bad(episode):
        await episode.ask("?")
        raise KeyError("bug")

    with pytest.raises(KeyError):
        await play(made(bad), said("x"))


async def draw(episode: Episode) -> float:
    await episode.ask(str([episode.rng.random() for _ in range(3)]))
    return 0


async def test_the_same_task_and_seed_draw_the_same_and_others_do_not():
    async def drawn(task_id, seed):
        client = Client(start(task_id, seed))
        async with hosting(made(draw)) as host:
            await host.episode(client)
        return client.heard[0].observation[0].content

    again = [await drawn("train-0", 7) for _ in range(2)]
    assert again[0] == again[1]
    others = [await drawn("train-1", 7), await drawn("train-0", 8), again[0]]
    assert len(set(others)) == 3


async def test_an_episode_that_is_cancelled_runs_its_cleanup_and_is_counted_no_more():
    left = []

    async def hold(episode):
        try:
            async with contextlib.aclosing(nothing()):
                await episode.ask("?")
        finally:
            await asyncio.sleep(0)
            left.append(episode.task.id)

    async def nothing():
        yield

    async with hosting(made(hold, max_concurrent_episodes=1)) as host:
        for _ in range(3):
            client = Client(start(), ends=False)
            task = asyncio.ensure_future(host.episode(client))
            await client.waiting.wait()
            with pytest.raises(Overloaded) as caught:
                await host.episode(Client(start()))
            assert caught.value.retry_after_s > 0
            assert caught.value.context["allowed"] == "1"
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert left == ["train-0"] * 3


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ([said("x")], InvalidRequest),
        ([start("no-such")], NotFound),
        ([start(seed=-1)], InvalidRequest),
        ([start(environment="other")], NotFound),
        ([start(), start()], InvalidRequest),
        ([start(), InvalidRequest("a message of nobody")], InvalidRequest),
    ],
)
async def test_what_a_client_gets_wrong_is_refused(script, error):
    async with hosting(made(echo)) as host:
        with pytest.raises(error):
            await host.episode(Client(*script))
        await host.episode(Client(start(environment="game"), said("end")))


async def test_a_stream_on_which_nothing_comes_is_over():
    client = Client()
    async with hosting(made(echo)) as host:
        await host.episode(client)
    assert client.heard == []


# --- several, and what they offer ----------------------------------------------------------------


async def test_of_several_environments_the_one_that_is_named_is_meant():
    async def second(episode):
        await episode.ask("second")

    async with hosting(made(echo, name="one"), made(second, name="two")) as host:
        assert [info.name for info in host.describe()] == ["one", "two"]
        for name, text in (("one", "abc"), ("two", "second")):
            client = Client(start(environment=name))
            await host.episode(client)
            assert client.heard[0].observation == user(text)
        with pytest.raises(NotFound):
            host.get_task("three", "train-0")
        with pytest.raises(InvalidRequest, match="one, two"):
            host.get_task("", "train-0")


async def test_what_is_not_offered_is_unimplemented():
    async with hosting(made(echo), made(score=lambda task, answer: 0, name="single")) as host:
        with pytest.raises(Unimplemented, match="episodes only"):
            await host.score("game", [Answered(Task("t"), [said("x")])])
        with pytest.raises(Unimplemented, match="single turns only"):
            await host.episode(Client(start(environment="single")))


async def test_a_task_has_its_chat_only_where_there_is_a_score():
    async with hosting(made(echo), made(score=lambda task, answer: 0, name="single")) as host:
        assert host.get_task("game", "train-0").messages == ()
        assert host.list_tasks("game", "train", 0, "")[0][0].messages == ()
        assert host.get_task("single", "train-0").messages == user("abc")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Host([]), "at least one environment"),
        (lambda: Host([made(echo), made(echo)]), "a name of its own"),
        (lambda: Host([made()]), "neither a score nor an episode"),
        (lambda: made(name="Game"), "no name of an environment"),
        (lambda: Environment("game", version="", tasks=TASKS), "version"),
        (lambda: made(echo, max_turns=0), "max_turns"),
        (lambda: made(lambda episode: 1.0), "coroutine"),
        (lambda: made(echo, max_concurrent_episodes=0), "at least 1"),
    ],
)
def test_what_an_author_gets_wrong_is_told_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- scores --------------------------------------------------------------------------------------


def score_text(task: Task, answer: str) -> float:
    return float(len(answer))


async def score_text_later(task: Task, answer: str) -> float:
    await asyncio.sleep(0.001 * (len(answer) % 3))
    return float(len(answer))


def score_message(task: Task, answer: Message) -> Scored:
    return Scored(float(len(answer.content)), {"length": 1.0}, "fine")


def answers(*texts):
    return [Answered(Task("t"), [Message("user", "?"), said(text)]) for text in texts]


@pytest.mark.parametrize("score", [score_text, score_text_later, score_message])
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 100, 1000])
async def test_a_batch_is_scored_in_its_order(score, count):
    texts = ["x" * (n * 7 % 11) for n in range(count)]
    async with hosting(made(score=score)) as host:
        scored = await host.score("", answers(*texts))
    assert [each.reward for each in scored] == [len(text) for text in texts]


async def test_the_parts_and_the_feedback_of_a_score_are_kept():
    async with hosting(made(score=score_message)) as host:
        (scored,) = await host.score("", answers("abc"))
    assert scored == Scored(3.0, {"length": 1.0}, "fine")


def picky(task: Task, answer: str) -> float | Scored:
    match answer:
        case "raise":
            raise RuntimeError("a secret")
        case "nan":
            return math.nan
        case "nan part":
            return Scored(1.0, {"part": math.inf})
        case "fail":
            return Scored(1.0, failure="the engine is away")
        case "nothing":
            return None
    return 1.0


async def picky_later(task: Task, answer: str) -> float | Scored:
    return picky(task, answer)


@pytest.mark.parametrize("score", [picky, picky_later])
async def test_what_a_function_fails_at_fails_alone_and_is_told_in_the_log(score, caplog):
    texts = ["fine", "raise", "nan", "nan part", "fail", "nothing", "fine"]
    async with hosting(made(score=score)) as host:
        with caplog.at_level(logging.ERROR):
            scored = await host.score("", answers(*texts))
    assert [each.reward for each in scored] == [1, 0, 0, 0, 0, 0, 1]
    assert [bool(each.failure) for each in scored] == [False, *[True] * 5, False]
    assert scored[4].failure == "the engine is away"
    assert "a secret" not in scored[1].failure
    assert "a secret" in caplog.text


@pytest.mark.parametrize("count", [0, 5])
async def test_a_batch_of_a_size_that_is_not_allowed_is_refused(count):
    async with hosting(made(score=score_text, max_score_batch=4)) as host:
        with pytest.raises(InvalidRequest) as caught:
            await host.score("", answers(*["x"] * count))
        assert caught.value.context["allowed"] == "1 to 4"
        assert len(await host.score("", answers(*["x"] * 4))) == 4


async def test_a_slow_batch_holds_no_other_up():
    scored = itertools.count()

    def slow(task, answer):
        if answer == "slow":
            time.sleep(0.03)
            next(scored)
        return 1.0

    async with hosting(made(score=slow)) as host:
        long = asyncio.ensure_future(host.score("", answers(*["slow"] * 600)))
        await asyncio.sleep(0)
        await host.score("", answers("quick"))
        assert next(scored) < 300  # A turn of each thread, and not the whole batch.
        assert len(await long) == 600


async def test_a_batch_whose_caller_is_gone_is_scored_no_further():
    begun = threading.Semaphore(0)
    go_on = threading.Event()
    num_scored = 0

    def slow(task, answer):
        nonlocal num_scored
        begun.release()
        go_on.wait()
        num_scored += 1
        return 1.0

    async with hosting(made(score=slow)) as host:
        batch = asyncio.ensure_future(host.score("", answers(*["x"] * 200)))
        await asyncio.to_thread(begun.acquire)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        go_on.set()
    for room in host._rooms.values():
        room.threads.shutdown(wait=True)
    assert num_scored <= 16


# --- what all episodes share ---------------------------------------------------------------------


async def test_resources_are_there_while_it_is_served_and_no_longer():
    seen = []

    async def play(episode):
        seen.append("played")
        await episode.ask("?")

    environment = made(play)

    @environment.lifespan
    @contextlib.asynccontextmanager
    async def resources():
        seen.append("opened")
        yield
        seen.append("closed")

    for _ in range(2):
        async with hosting(environment) as host:
            await host.episode(Client(start(), said("x")))
    assert seen == ["opened", "played", "closed"] * 2


async def test_resources_that_do_not_open_leave_none_of_the_others_open():
    seen = []
    first, second = made(echo, name="first"), made(echo, name="second")

    @first.lifespan
    @contextlib.asynccontextmanager
    async def resources():
        seen.append("opened")
        try:
            yield
        finally:
            seen.append("closed")

    @second.lifespan
    @contextlib.asynccontextmanager
    async def fails():
        raise OSError("no")
        yield

    with pytest.raises(OSError, match="no"):
        async with hosting(first, second):
            pass
    assert seen == ["opened", "closed"]


async def test_tools_that_the_episode_runs_itself_are_told_too():
    tool = Tool("look", "Looks.", '{"type": "object"}')
    (info,) = Host([made(echo, tools=[tool])]).describe()
    assert (info.tools, info.observation_kinds) == ((tool,), ("text", "tool"))
