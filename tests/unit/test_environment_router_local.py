"""Environments inside the reward service, served as the others are; and what routing tells."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from rollmesh import chat
from rollmesh.errors import (
    EnvironmentFailed,
    InternalError,
    InvalidRequest,
    NotFound,
    Unavailable,
    Unimplemented,
)
from services.reward.environments.local import MAX_PAGE, ServedHere
from services.reward.environments.router import Router
from tests.fakes.replicas import FakeServer, World

NUM_TASKS = 2500


class Numbers:
    """Tasks are numbers, and an answer is worth its length."""

    info = chat.EnvironmentInfo(
        name="numbers", version="1", splits=(chat.Split("train", NUM_TASKS),), has_score=True
    )

    def __init__(self):
        self.waiting = asyncio.Event()
        self.num_waiting = 0

    def page(self, split, start, count):
        return [chat.Task(f"{n}", split) for n in range(start, min(start + count, NUM_TASKS))]

    def task(self, task_id):
        if not task_id.isdecimal():
            raise NotFound("there is no such number")
        return chat.Task(task_id, "train")

    async def score(self, items):
        self.num_waiting += 1
        await self.waiting.wait()
        return [chat.Scored(float(len(item.messages[-1].content))) for item in items]


@pytest.fixture
def numbers():
    return Numbers()


@pytest.fixture
def router(numbers):
    return Router([ServedHere(numbers)])


@pytest.mark.parametrize("page_size", [0, 7, 500, 10_000])
async def test_its_tasks_come_page_by_page_each_once(router, page_size):
    found, token, sizes = [], "", []
    while True:
        tasks, token = await router.list_tasks(
            "numbers", "train", page_size=page_size, page_token=token
        )
        sizes.append(len(tasks))
        found += [int(task.id) for task in tasks]
        if not token:
            break
    assert found == list(range(NUM_TASKS))
    assert 0 < min(sizes) <= max(sizes) <= min(page_size or MAX_PAGE, MAX_PAGE)


@pytest.mark.parametrize(
    ("split", "token", "field"),
    [
        ("test", "", "split"),
        ("train", "-1", "page_token"),
        ("train", "x", "page_token"),
        ("train", "9" * 30, "page_token"),
    ],
)
async def test_a_page_that_is_none_is_refused_by_its_field(router, split, token, field):
    with pytest.raises(InvalidRequest) as raised:
        await router.list_tasks("", split, page_size=0, page_token=token)
    assert raised.value.context["field"] == field


async def test_its_answers_are_scored_and_it_tells_how_many_are(router, numbers):
    items = [chat.Answered(chat.Task("1"), [chat.Message("assistant", "four")])]
    scoring = asyncio.ensure_future(router.score("numbers", items))
    while not numbers.num_waiting:
        await asyncio.sleep(0)
    (status,) = router.list_environments()
    assert status == chat.EnvironmentStatus("numbers", serving=True, num_serving=1, num_running=1)
    numbers.waiting.set()
    assert [scored.reward for scored in await scoring] == [4.0]
    assert router.list_environments()[0].num_running == 0
    assert router.describe() == [numbers.info]
    assert (await router.get_task("numbers", "3")).id == "3"
    with pytest.raises(NotFound):
        await router.get_task("numbers", "three")


async def test_it_has_no_episodes(router):
    async def requests():
        yield chat.Start("numbers", "1")

    with pytest.raises(Unimplemented):
        await router.play(requests(), None)


async def test_a_service_that_ends_scores_nothing_more(router):
    router.end(within_s=0)
    with pytest.raises(Unavailable):
        await router.score(
            "numbers", [chat.Answered(chat.Task("1"), [chat.Message("assistant", "x")])]
        )


async def test_what_can_never_work_is_refused(router):
    for task_id in ("", "t" * 256):
        with pytest.raises(NotFound, match="task_id"):
            await router.get_task("numbers", task_id)
    with pytest.raises(InvalidRequest, match="page_size"):
        await router.list_tasks("numbers", "train", page_size=-1, page_token="")


# --- telemetry ------------------------------------------------------------------------------------


def test_calls_are_measured_by_how_they_end_and_by_how_long_they_wait(recorded, spans):
    server = FakeServer()
    world = World(server)
    server.release("a")
    server.raises["b"] = InternalError("boom")

    async def scenario():
        await world.serves()
        await world.score("a")
        with contextlib.suppress(EnvironmentFailed):
            await world.score("b")
        running = world.score("c")
        await world.until(lambda: server.scoring == ["c"])
        running.cancel()
        await asyncio.wait([running])
        with contextlib.suppress(NotFound):
            await world.environment.get_task("nowhere")

    world.play(scenario)
    metrics = recorded()
    calls = {
        (point.attributes["method"], point.attributes["outcome"]): point.count
        for point in metrics["rollmesh.environment.call"].data.data_points
    }
    assert calls == {
        ("Score", "ok"): 1,
        ("Score", "environment_failed"): 1,
        ("Score", "cancelled"): 1,
        ("GetTask", "not_found"): 1,
    }
    (waiting,) = metrics["rollmesh.environment.waiting"].data.data_points
    assert (waiting.count, dict(waiting.attributes)) == (4, {"environment": "game"})
    tried = [span for span in spans() if span.name == "environment.call"]
    assert [span.attributes["rollmesh.kind"] for span in tried] == ["score"] * 3 + ["read"]
