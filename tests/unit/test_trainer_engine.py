"""The engine's queue: order, bound, and callers that go away."""

from __future__ import annotations

import asyncio
import threading

import pytest

from rollmesh.errors import InvalidRequest, Overloaded
from services.trainer.engine import Engine


class Gate:
    """An op that begins, and ends when it is told to."""

    def __init__(self):
        self.begun = threading.Event()
        self.open = threading.Event()
        self.finished = threading.Event()

    def __call__(self):
        self.begun.set()
        self.open.wait()
        self.finished.set()
        return threading.current_thread().name

    async def has_begun(self):
        await asyncio.to_thread(self.begun.wait)


@pytest.fixture
def engine():
    engine = Engine(max_queued_ops=2)
    yield engine
    engine.close()


@pytest.fixture
def gate(engine):  # torn down before the engine, which waits for it
    gate = Gate()
    yield gate
    gate.open.set()


async def settle():
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_ops_run_one_at_a_time_in_order_of_arrival_in_one_thread(engine, gate):
    order = []
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(engine.run(gate))
        await gate.has_begun()
        tasks.create_task(engine.run(order.append, 1))
        await settle()
        tasks.create_task(engine.run(order.append, 2))
        await settle()
        assert order == []
        gate.open.set()
    assert order == [1, 2]
    assert first.result() != threading.current_thread().name


async def test_more_ops_than_may_wait_are_refused_with_the_bound(engine, gate):
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(engine.run(gate))
        await gate.has_begun()
        waiting = [tasks.create_task(engine.run(int)) for _ in range(2)]
        await settle()
        with pytest.raises(Overloaded) as caught:
            await engine.run(int)
        assert caught.value.context["allowed"] == "2"
        assert caught.value.retry_after_s > 0
        gate.open.set()
    assert [task.result() for task in waiting] == [0, 0]
    assert await engine.run(int) == 0


async def test_a_cancelled_op_that_has_not_begun_never_runs_and_frees_its_place(engine, gate):
    order = []
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(engine.run(gate))
        await gate.has_begun()
        dropped = tasks.create_task(engine.run(order.append, "dropped"))
        tasks.create_task(engine.run(order.append, "kept"))
        await settle()
        dropped.cancel()
        await settle()
        tasks.create_task(engine.run(order.append, "next"))
        gate.open.set()
    assert order == ["kept", "next"]


async def test_a_cancelled_op_that_has_begun_keeps_its_turn_until_it_ends(engine, gate):
    caller = asyncio.ensure_future(engine.run(gate))
    await gate.has_begun()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    waiting = [asyncio.ensure_future(engine.run(gate.finished.is_set)) for _ in range(2)]
    await settle()
    with pytest.raises(Overloaded):
        await engine.run(int)
    assert not gate.finished.is_set()
    gate.open.set()
    assert await asyncio.gather(*waiting) == [True, True]


async def test_what_an_op_raises_reaches_its_caller_and_the_engine_goes_on(engine):
    def refuse():
        raise InvalidRequest("no", field="data")

    with pytest.raises(InvalidRequest):
        await engine.run(refuse)
    assert await engine.run(int) == 0
