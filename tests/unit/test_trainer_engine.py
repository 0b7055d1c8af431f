"""The engine: turns, fusion, order, bound, and callers that go away."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest

from rollmesh.errors import InvalidRequest, NonFinite, Overloaded, Unavailable
from rollmesh.types import Datum, LossConfig
from services.trainer.engine import Engine
from services.trainer.model import Model
from tests.fakes.tiny_qwen3 import TARGETS, batch, tiny_qwen3

CONFIG = LossConfig("importance_sampling")


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


class Passes(Model):
    """The tiny model, which notes the adapters' ranks in each pass, one for each unit."""

    def __init__(self, *, max_batch_tokens=64):
        module = tiny_qwen3(max_position_embeddings=96)
        super().__init__(module, max_batch_tokens=max_batch_tokens)
        self.passes = []
        self.before_pass = lambda _ranks: None

    def run_pass(self, parts):
        ranks = [next(iter(part.weights.factors.values())).a_RI.shape[0] for part in parts]
        self.passes.append(ranks)
        self.before_pass(ranks)
        return super().run_pass(parts)

    def weights(self, rank):
        return self.lora.fresh(rank=rank, alpha=8.0, target_modules=TARGETS, seed=rank)


@pytest.fixture
def model():
    return Passes()


@pytest.fixture
def engine(model):
    ticks = itertools.count()
    engine = Engine(model, max_queued_ops=9, clock=lambda: float(next(ticks)))
    yield engine
    engine.close()


@pytest.fixture
def gate(engine):  # torn down before the engine, which waits for it
    gate = Gate()
    yield gate
    gate.open.set()


@contextlib.asynccontextmanager
async def held(engine, gate):
    """The tasks begun inside all wait when the block ends; then the thread goes on with them."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(engine.run(gate))
        await gate.has_begun()
        yield tasks
        await settle()
        gate.open.set()


async def settle():
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


def training(tasks, engine, model, rank, lengths, config=CONFIG):
    """A ForwardBackward of the adapter that is known by its rank; without a config a Forward."""
    data = batch(lengths, seed=rank)
    name, weights = f"adapter {rank}", model.weights(rank)
    if config is None:
        return tasks.create_task(engine.forward(name, weights, data))
    return tasks.create_task(engine.forward_backward(name, weights, data, config))


async def test_ops_run_one_at_a_time_in_order_of_arrival_in_one_thread(engine, gate):
    order = []
    async with held(engine, gate) as tasks:
        tasks.create_task(engine.run(order.append, 1))
        await settle()
        tasks.create_task(engine.run(order.append, 2))
        await settle()
        assert order == []
    assert order == [1, 2]
    assert await engine.run(gate) == "trainer-engine" != threading.current_thread().name


async def test_more_than_may_wait_are_refused_with_the_bound(engine, gate, model):
    async with held(engine, gate) as tasks:
        waiting = [tasks.create_task(engine.run(int)) for _ in range(9)]
        trained = [training(tasks, engine, model, 1, (3,)) for _ in range(9)]
        await settle()
        for refused in (
            engine.run(int),
            engine.forward("adapter 1", model.weights(1), batch((3,))),
        ):
            with pytest.raises(Overloaded) as caught:
                await refused
            assert caught.value.context["allowed"] == "9"
            assert caught.value.retry_after_s > 0
        # One that fills its own queue takes nobody else's place.
        trained.append(training(tasks, engine, model, 2, (3,)))
    assert [task.result() for task in waiting] == [0] * 9
    assert all(task.result().gradients for task in trained)
    assert await engine.run(int) == 0


async def test_a_batch_that_cannot_even_be_cut_fails_alone(engine, gate, model):
    wrong = [Datum(np.zeros(8, np.int32), np.zeros(8, np.int32), np.ones(3, np.float32))]
    async with held(engine, gate) as tasks:
        bad = asyncio.ensure_future(engine.forward("adapter 4", model.weights(4), wrong))
        good = training(tasks, engine, model, 1, (8,))
        await settle()
    with pytest.raises(ValueError, match="broadcast"):
        await bad
    assert good.result().gradients
    assert await engine.run(int) == 0


async def test_a_cancelled_op_that_has_not_begun_never_runs_and_frees_its_place(
    engine, gate, model
):
    order = []
    async with held(engine, gate) as tasks:
        dropped = [
            *(tasks.create_task(engine.run(order.append, "dropped")) for _ in range(5)),
            *(training(tasks, engine, model, rank, (3,)) for rank in (1, 1, 2, 2)),
        ]
        await settle()
        for task in dropped:
            task.cancel()
        await settle()
        tasks.create_task(engine.run(order.append, "kept"))
        training(tasks, engine, model, 3, (3,))
    assert order == ["kept"]
    assert model.passes == [[3]]


async def test_a_cancelled_op_that_has_begun_keeps_its_turn_until_it_ends(engine, gate):
    caller = asyncio.ensure_future(engine.run(gate))
    await gate.has_begun()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    waiting = asyncio.ensure_future(engine.run(gate.finished.is_set))
    await settle()
    assert not waiting.done()
    gate.open.set()
    assert await waiting


async def test_a_cancelled_batch_that_has_begun_runs_to_its_end(engine, gate, model):
    model.before_pass = lambda _ranks: gate() if len(model.passes) == 1 else None
    caller = asyncio.ensure_future(
        engine.forward_backward("a", model.weights(1), batch((30,) * 6), CONFIG)
    )
    await gate.has_begun()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    gate.open.set()
    await engine.forward("b", model.weights(2), batch((3,)))
    await engine.forward("a", model.weights(3), batch((3,)))
    assert [ranks for ranks in model.passes if ranks == [1]] == [[1]] * 3


async def test_what_an_op_raises_reaches_its_caller_and_the_engine_goes_on(engine):
    def refuse():
        raise InvalidRequest("no", field="data")

    with pytest.raises(InvalidRequest):
        await engine.run(refuse)
    assert await engine.run(int) == 0


async def test_whatever_waits_shares_a_pass_with_its_own_length_and_kind(engine, gate, model):
    async with held(engine, gate) as tasks:
        training(tasks, engine, model, 1, (3,))
        training(tasks, engine, model, 2, (50,))
        training(tasks, engine, model, 3, (32,))
        training(tasks, engine, model, 4, (1,), None)
        training(tasks, engine, model, 5, (17,), None)
    assert model.passes == [[1, 3], [2], [4, 5]]


async def test_a_batch_alone_does_not_wait_for_company(engine, model):
    await engine.forward_backward("a", model.weights(1), batch((3,)), CONFIG)
    assert model.passes == [[1]]


async def test_a_long_batch_is_cut_and_the_others_have_their_turns(engine, gate, model):
    """Units of two sequences fill a pass: each adapter leads one in turn."""
    async with held(engine, gate) as tasks:
        training(tasks, engine, model, 1, (30,) * 8)
        training(tasks, engine, model, 2, (30,) * 4)
        training(tasks, engine, model, 3, (60,))
    assert model.passes == [[1], [2], [3], [1], [2], [1], [1]]


async def test_the_room_left_in_a_pass_is_given_out_in_turn():
    model, gate = Passes(max_batch_tokens=1024), Gate()
    with contextlib.closing(Engine(model, max_queued_ops=9)) as engine:
        async with held(engine, gate) as tasks:
            training(tasks, engine, model, 1, (30,) * 20)  # 640 tokens, a unit
            training(tasks, engine, model, 2, (30,) * 2)
            training(tasks, engine, model, 3, (30,) * 32)
            training(tasks, engine, model, 4, (30,) * 6)
    assert model.passes == [[1, 2, 4], [3]]


async def test_batches_of_one_adapter_run_in_order_of_arrival(engine, gate, model):
    ended = []
    async with held(engine, gate) as tasks:
        for number, lengths in enumerate([(30,) * 6, (3,), (50,)]):
            task = training(tasks, engine, model, 1, lengths)
            task.add_done_callback(lambda _, number=number: ended.append(number))
            await settle()
    assert ended == [0, 1, 2]


async def test_ops_run_between_the_passes_of_a_long_batch(engine, gate, model):
    seen = []
    model.before_pass = lambda _ranks: gate() if len(model.passes) == 2 else None
    async with asyncio.TaskGroup() as tasks:
        training(tasks, engine, model, 1, (30,) * 10)
        await gate.has_begun()
        tasks.create_task(engine.run(lambda: seen.append(len(model.passes))))
        await settle()
        gate.open.set()
    assert seen == [2]
    assert len(model.passes) == 5


async def test_ops_that_keep_coming_do_not_keep_batches_from_running(engine, gate, model):
    """Each op brings the next one, until a pass has run."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    async def again():
        while not model.passes:
            await engine.run(int)
        done.set()

    async with held(engine, gate) as tasks:
        tasks.create_task(again())
        tasks.create_task(again())
        training(tasks, engine, model, 1, (3,))
    await done.wait()
    assert loop.is_running()


async def test_a_pass_that_breaks_fails_the_batch_that_breaks_it_alone(engine, gate, model):
    def explode(ranks):
        if 2 in ranks:
            raise ZeroDivisionError

    async with held(engine, gate) as tasks:
        well = [training(tasks, engine, model, rank, (5, 9)) for rank in (1, 3)]
        broken = asyncio.ensure_future(
            engine.forward_backward("b", model.weights(2), batch((5,)), CONFIG)
        )
        await settle()
        model.before_pass = explode
    with pytest.raises(ZeroDivisionError):
        await broken
    for rank, task in zip((1, 3), well, strict=True):
        alone = model.forward_backward(model.weights(rank), batch((5, 9), seed=rank), CONFIG)
        assert [g.tolist() for g in task.result().gradients] == [
            g.tolist() for g in alone.gradients
        ]


async def test_only_the_batch_whose_loss_is_not_finite_fails_and_its_datum_is_named(
    engine, gate, model
):
    data = batch((5, 9, 12))
    data[1] = replace(data[1], weights=np.full(9, np.inf, np.float32))
    async with held(engine, gate) as tasks:
        well = [training(tasks, engine, model, rank, (5, 9)) for rank in (1, 3)]
        broken = asyncio.ensure_future(engine.forward_backward("b", model.weights(2), data, CONFIG))
        await settle()
    with pytest.raises(NonFinite) as caught:
        await broken
    assert caught.value.context["field"] == "data[1]"
    assert all(task.result().gradients for task in well)


async def test_the_time_queued_and_the_time_run_are_told_apart(engine, gate, model):
    """The clock ticks at each call: once when queued, once a pass, once at the end."""
    async with held(engine, gate) as tasks:
        task = training(tasks, engine, model, 1, (30,) * 4)
    assert (task.result().metrics["queued_s"], task.result().metrics["run_s"]) == (1, 2)


async def test_what_waits_when_the_engine_closes_is_told_so(model):
    engine, gate = Engine(model, max_queued_ops=9), Gate()
    running = asyncio.ensure_future(engine.run(gate))
    await gate.has_begun()
    waiting = [
        asyncio.ensure_future(engine.run(int)),
        asyncio.ensure_future(engine.forward("a", model.weights(1), batch((3,)))),
    ]
    await settle()
    closing = asyncio.ensure_future(asyncio.to_thread(engine.close))
    while not engine._closed:
        await asyncio.sleep(0)
    gate.open.set()
    await closing
    assert await running == "trainer-engine"
    assert [type(found) for found in await asyncio.gather(*waiting, return_exceptions=True)] == [
        Unavailable,
        Unavailable,
    ]
    with pytest.raises(Unavailable):
        await engine.run(int)
