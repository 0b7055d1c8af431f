"""Real worker processes: bounded in time and memory, replaced when lost, gone in the end."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from rollmesh.chat import Scored
from rollmesh.errors import InvalidRequest
from rollmesh.types import ScoreItem
from services.reward.workers import Stuck, Workers

EXPLODING = ("regex_match", {"pattern": "(a+)+$"}, ScoreItem("a" * 60 + "b"))
HARMLESS = ("regex_match", {"pattern": "b$"}, ScoreItem("ab"))


@pytest.fixture
async def workers():
    async with Workers(count=1, item_timeout_s=0.3) as running:
        yield running


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(EXPLODING, id="a regular expression"),
        pytest.param(("math_match", {}, ScoreItem("9**9**9**9", "3")), id="a formula"),
    ],
)
async def test_an_item_over_its_time_is_stuck_and_the_next_one_is_scored(workers, work):
    with pytest.raises(Stuck, match=r"more than 0\.3 s of processor time"):
        await workers.score(*work)
    assert await workers.score(*HARMLESS) == Scored(1.0)


async def test_one_process_scores_many_items(workers):
    for _ in range(3):
        assert await workers.score(*HARMLESS) == Scored(1.0)
    assert len(workers._idle) == 1


async def test_what_a_function_refuses_is_refused_with_its_context(workers):
    with pytest.raises(InvalidRequest, match="neither a number") as caught:
        await workers.score("math_match", {}, ScoreItem("7", "Paris"))
    assert caught.value.context == {"field": "reference", "value": "Paris"}
    assert await workers.score(*HARMLESS) == Scored(1.0)


async def test_a_bug_in_a_function_is_no_verdict(workers):
    with pytest.raises(RuntimeError, match="TypeError"):
        await workers.score("regex_match", {"pattern": "a"}, ScoreItem(None, "b"))
    assert await workers.score(*HARMLESS) == Scored(1.0)


async def test_a_process_that_was_killed_while_idle_costs_nobody_anything(workers):
    assert await workers.score(*HARMLESS) == Scored(1.0)
    (process,) = workers._idle
    process.kill()
    await process.wait()
    assert await workers.score(*HARMLESS) == Scored(1.0)


async def test_waiting_callers_take_turns_by_item(workers):
    order = []

    async def batch(name):
        for _ in range(3):
            await workers.score(*HARMLESS)
            order.append(name)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(batch("a"))
        tasks.create_task(batch("b"))
    assert order == ["a", "b"] * 3


async def test_a_caller_that_goes_away_leaves_no_process_and_no_lost_place():
    async with Workers(count=1, item_timeout_s=60) as workers:
        assert await workers.score(*HARMLESS) == Scored(1.0)
        (process,) = workers._idle
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await workers.score(*EXPLODING)
        assert process.returncode == -signal.SIGKILL
        assert await workers.score(*HARMLESS) == Scored(1.0)


async def test_no_process_outlives_its_pool():
    async with Workers(count=2, item_timeout_s=1) as workers:
        await asyncio.gather(workers.score(*HARMLESS), workers.score(*HARMLESS))
        pids = [process.pid for process in workers._idle]
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)
