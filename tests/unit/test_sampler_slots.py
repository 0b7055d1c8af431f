"""More adapters than slots: who begins, who waits, what is loaded when."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace
from pathlib import Path

import pytest

from rollmesh.errors import DigestMismatch, InternalError, Unavailable
from rollmesh.types import Continuation
from services.sampler.admission import Need
from services.sampler.backends.base import Draw, LoadedAdapter
from services.sampler.slots import Slots
from tests.fakes.engines import FakeEngine
from tests.fakes.virtual_time import simulate

A, B, C, D = (LoadedAdapter(n, f"adapter {n}", Path("/"), "d") for n in range(1, 5))
DRAW = Draw(1, 1.0, top_k=0, top_p=1.0, seed=0, stop=(), stop_token_ids=(), ignore_eos=False)
LONG = Need(shared_tokens=1, each_tokens=1, num_completions=1)


def in_virtual_time(test):
    def run(*args, **kwargs):
        simulate(test(*args, **kwargs))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@contextlib.asynccontextmanager
async def open_slots(engine, *, quantum_s=1.0, max_completions=256, kv_overcommit=1.0):
    slots = Slots(
        engine, quantum_s=quantum_s, kv_overcommit=kv_overcommit, max_completions=max_completions
    )
    slots.open(engine.model)
    async with slots:
        yield slots


def now():
    return asyncio.get_running_loop().time()


class Users:
    """Requests that use an adapter for so long, and when they began."""

    def __init__(self, slots, engine):
        self.slots = slots
        self.engine = engine
        self.began: dict[str, float] = {}

    async def use(self, name, adapter, seconds, **need):
        async with self.slots.use(adapter, LONG._replace(**need)):
            assert adapter is None or adapter.number in self.engine.slots
            self.began[name] = now()
            await asyncio.sleep(seconds)
            assert adapter is None or adapter.number in self.engine.slots


@in_virtual_time
async def test_requests_of_an_adapter_in_a_slot_begin_at_once_while_another_is_loaded():
    engine = FakeEngine(max_loras=2, load_s=10.0)
    async with open_slots(engine) as slots, asyncio.TaskGroup() as tasks:
        users = Users(slots, engine)
        tasks.create_task(users.use("a1", A, 30))
        await asyncio.sleep(11)
        tasks.create_task(users.use("b", B, 1))
        await asyncio.sleep(1)
        tasks.create_task(users.use("a2", A, 1))
        tasks.create_task(users.use("base", None, 1))
        await asyncio.sleep(0.1)
        assert users.began == {"a1": 10, "a2": 12, "base": 12}
    assert users.began["b"] == 21


@in_virtual_time
async def test_after_its_turn_an_adapter_lets_its_requests_end_and_others_go_first():
    engine = FakeEngine(max_loras=1, load_s=0.0)
    async with open_slots(engine, quantum_s=2.0) as slots, asyncio.TaskGroup() as tasks:
        users = Users(slots, engine)
        tasks.create_task(users.use("a1", A, 5))
        await asyncio.sleep(1)
        tasks.create_task(users.use("b1", B, 1))
        tasks.create_task(users.use("b2", B, 1))
        tasks.create_task(users.use("a2", A, 1))
        await asyncio.sleep(2)
        tasks.create_task(users.use("a3", A, 1))
        tasks.create_task(users.use("c", C, 1))
    assert users.began["a1"] == 0
    assert users.began["a2"] == 1, "its turn was not over"
    assert users.began["b1"] == users.began["b2"] == 5, "all that waited begin together"
    assert users.began["a3"] < users.began["c"]
    assert engine.loads == [1, 2, 1, 3]


@in_virtual_time
async def test_without_others_waiting_an_adapter_keeps_its_slot():
    engine = FakeEngine(max_loras=1)
    async with open_slots(engine, quantum_s=1.0) as slots:
        users = Users(slots, engine)
        for n in range(10):
            await users.use(f"{n}", A, 3)
        assert engine.loads == [1]


@in_virtual_time
async def test_an_idle_adapter_leaves_first_and_of_those_the_one_unused_longest():
    engine = FakeEngine(max_loras=3)
    async with open_slots(engine) as slots, asyncio.TaskGroup() as tasks:
        users = Users(slots, engine)
        tasks.create_task(users.use("a", A, 30))
        await users.use("b", B, 1)
        await users.use("c", C, 1)
        await users.use("b again", B, 1)
        await users.use("d", D, 1)
        assert engine.slots == {1, 2, 4}
        assert slots.resident(B)
        assert not slots.resident(C)
        assert slots.proven(C), "it was read back once"


@pytest.mark.parametrize("other", ["request", "load"])
def test_a_closed_slot_opens_again_when_nobody_waits_for_it_any_more(other):
    async def test():
        engine = FakeEngine(max_loras=1, load_s=0.0)
        async with open_slots(engine) as slots, asyncio.TaskGroup() as tasks:
            users = Users(slots, engine)
            tasks.create_task(users.use("a1", A, 100))
            await asyncio.sleep(2)
            waiting = tasks.create_task(
                users.use("b", B, 1) if other == "request" else slots.prove(B)
            )
            await asyncio.sleep(1)
            tasks.create_task(users.use("a2", A, 1))
            await asyncio.sleep(1)
            assert "a2" not in users.began
            waiting.cancel()
            await asyncio.sleep(1)
            assert users.began["a2"] == 4
        assert engine.loads == [1]

    simulate(test())


@in_virtual_time
async def test_who_waits_for_memory_keeps_no_slot():
    engine = FakeEngine(max_loras=1, kv_tokens=10, load_s=0.0)
    async with open_slots(engine, quantum_s=1.0) as slots, asyncio.TaskGroup() as tasks:
        users = Users(slots, engine)
        for n in range(4):
            tasks.create_task(users.use(f"a{n}", A, 3, each_tokens=6))
        tasks.create_task(users.use("b", B, 3, each_tokens=6))
    began = sorted(users.began, key=users.began.__getitem__)
    assert began == ["a0", "b", "a1", "a2", "a3"]


@in_virtual_time
async def test_memory_goes_to_who_came_first_whatever_the_adapter():
    engine = FakeEngine(max_loras=2, kv_tokens=10, load_s=0.0)
    async with open_slots(engine) as slots, asyncio.TaskGroup() as tasks:
        users = Users(slots, engine)
        for n, adapter in enumerate((A, B, None, A, B, None, B, A)):
            tasks.create_task(users.use(f"{n}", adapter, 1, each_tokens=9))
            await asyncio.sleep(0.01)
    assert sorted(users.began, key=users.began.__getitem__) == [*"01234567"]


@in_virtual_time
async def test_no_slot_changes_hands_before_it_has_served_anybody():
    engine = FakeEngine(max_loras=1, kv_tokens=10, load_s=0.0)
    async with open_slots(engine, quantum_s=1.0) as slots, asyncio.TaskGroup() as tasks:
        users = Users(slots, engine)
        tasks.create_task(users.use("base", None, 20, each_tokens=9))
        for name, adapter in (("a", A), ("b", B)):
            tasks.create_task(users.use(name, adapter, 1, each_tokens=9))
    assert engine.loads == [1, 2]


@pytest.mark.parametrize("error", [DigestMismatch("other tensors"), Unavailable("dead")])
def test_a_load_that_fails_fails_those_who_wait_for_it_alone(error):
    async def test():
        engine = FakeEngine(max_loras=1)
        engine.load_errors[1] = error
        async with open_slots(engine) as slots:
            users = Users(slots, engine)
            found = await asyncio.gather(
                users.use("a1", A, 1),
                users.use("a2", A, 1),
                slots.prove(A),
                users.use("b", B, 1),
                return_exceptions=True,
            )
            *failed, other = found
            assert other is None
            assert [(type(each), each.args) for each in failed] == [(type(error), error.args)] * 3
            assert len({id(each) for each in (error, *failed)}) == 4
            assert not slots.proven(A)
            del engine.load_errors[1]
            await users.use("a3", A, 1)
            assert slots.proven(A)

    simulate(test())


@in_virtual_time
async def test_a_bug_in_a_load_is_told_and_the_slots_go_on():
    engine = FakeEngine(max_loras=1)
    engine.load_errors[1] = KeyError("bug")
    async with open_slots(engine) as slots:
        users = Users(slots, engine)
        with pytest.raises(InternalError):
            await users.use("a", A, 1)
        await users.use("b", B, 1)


@in_virtual_time
async def test_to_prove_an_adapter_takes_a_slot_once_and_gives_it_up_at_once():
    engine = FakeEngine(max_loras=1, load_s=0.5)
    async with open_slots(engine) as slots:
        users = Users(slots, engine)
        assert await slots.prove(A) == 0.5
        assert slots.proven(A)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(users.use("b", B, 1))
        assert engine.slots == {2}
        assert await slots.prove(A) == 0.0
        assert engine.loads == [1, 2]


@in_virtual_time
async def test_a_forgotten_adapter_is_out_of_the_engine_before_its_files_go():
    engine = FakeEngine(max_loras=2, load_s=1.0)
    async with open_slots(engine) as slots, asyncio.TaskGroup() as tasks:
        users = Users(slots, engine)
        await users.use("a", A, 1)
        await slots.forget(A)
        assert engine.slots == set()
        assert not slots.proven(A)
        await slots.forget(A)
        # In the middle of a load whose request has gone.
        request = tasks.create_task(users.use("b", B, 1))
        await asyncio.sleep(0.5)
        request.cancel()
        await slots.forget(B)
        assert now() == 3
        assert engine.slots == set()
        assert not slots.proven(B)
        await users.use("c", C, 1)


@in_virtual_time
async def test_an_adapter_forgotten_while_it_waits_for_another_to_leave_is_not_left_behind():
    engine = FakeEngine(max_loras=1, load_s=1.0, unload_s=1.0)
    async with open_slots(engine) as slots, asyncio.TaskGroup() as tasks:
        users = Users(slots, engine)
        await users.use("a", A, 1)
        request = tasks.create_task(users.use("b", B, 1))
        await asyncio.sleep(0.5)
        request.cancel()
        await slots.forget(B)
        assert engine.slots == set()
        await users.use("c", C, 1)
        assert engine.slots == {3}


@in_virtual_time
async def test_a_load_is_asked_for_while_the_adapter_before_it_still_leaves():
    asked = []

    class Noting(FakeEngine):
        async def load(self, adapter):
            asked.append(("load", adapter.number, set(self.slots)))
            await super().load(adapter)

    engine = Noting(max_loras=1, unload_s=1.0, load_s=1.0)
    async with open_slots(engine) as slots:
        users = Users(slots, engine)
        await users.use("a", A, 1)
        await users.use("b", B, 1)
        assert asked == [("load", 1, set()), ("load", 2, {1})]
        assert engine.slots == {2}


async def _chaos(seed):
    """Random requests, cancels and failures; the engine itself asserts that it is used well."""
    draw = random.Random(seed)
    engine = FakeEngine(
        max_loras=draw.randint(1, 3),
        kv_tokens=draw.choice([0, 60]),
        load_s=draw.random() / 20,
        unload_s=draw.random() / 50,
    )
    adapters = [LoadedAdapter(n, f"{n}", Path("/"), "d") for n in range(1, 8)]
    longest_s = 0.0

    async def request(slots):
        nonlocal longest_s
        adapter = draw.choice([None, *adapters])
        need = Need(draw.randint(1, 20), draw.randint(1, 20), draw.randint(1, 4))
        if adapter is not None and draw.random() < 0.1:
            await slots.prove(adapter)
            return
        begun_at = now()
        async with slots.use(adapter, need) as use:
            longest_s = max(longest_s, now() - begun_at)
            assert slots.reserved_tokens <= 60 or not engine.model.kv_tokens
            for _ in range(need.num_completions):
                await asyncio.sleep(draw.random())
                assert adapter is None or adapter.number in engine.slots
                use.end_one()

    async with open_slots(engine, quantum_s=draw.choice([0.1, 1.0])) as slots:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(150):
                task = tasks.create_task(request(slots))
                if draw.random() < 0.2:
                    asyncio.get_running_loop().call_later(draw.random() * 5, task.cancel)
                await asyncio.sleep(draw.random() * 0.2)
        assert slots.reserved_tokens == 0
        for adapter in adapters:
            await slots.forget(adapter)
        assert engine.slots == set()
        for part in (slots, slots._turns):
            kept = {name: value for name, value in vars(part).items() if hasattr(value, "__len__")}
            assert not any(kept.values()), kept
    return longest_s


@pytest.mark.parametrize("seed", range(20))
def test_nobody_starves_and_nothing_is_left_under_random_load(seed):
    assert simulate(_chaos(seed)) < 200


async def _throughput(*, num_slots, num_adapters, clients, group, max_tokens, roam):
    """Tokens a second of clients that ask again as soon as they are answered; longest wait."""
    engine = FakeEngine(
        max_loras=num_slots, step_s=0.02, token_s=0.0004, max_num_seqs=48, early=True
    )
    adapters = [LoadedAdapter(n, f"{n}", Path("/"), "d") for n in range(1, num_adapters + 1)]
    served: dict[int, int] = {}

    async def client(slots, number, place):
        draw = random.Random(f"{number}/{place}")
        while now() < 12:
            adapter = draw.choice(adapters) if roam else adapters[number]
            params = replace(DRAW, max_tokens=max_tokens, seed=draw.randrange(2**60))
            completions = [Continuation(n) for n in range(group)]
            async with slots.use(adapter, Need(4, max_tokens, group)) as running:
                drawn = engine.sample(adapter, [1], completions, params, project="p")
                async for delta in drawn:
                    if delta.stop_reason:
                        running.end_one()
            served[adapter.number] = served.get(adapter.number, 0) + 1
            await asyncio.sleep(draw.random() * 0.01)

    async with open_slots(engine, max_completions=48) as slots, asyncio.TaskGroup() as tasks:
        for number in range(num_adapters):
            for place in range(clients):
                tasks.create_task(client(slots, number, place))
    assert len(served) == num_adapters
    return engine.num_tokens / now()


@pytest.mark.parametrize(
    ("clients", "group", "max_tokens", "roam"),
    [(4, 4, 8, False), (4, 2, 100, False), (4, 4, 60, True), (4, 8, 200, False), (1, 8, 4, False)],
)
def test_a_working_set_of_four_times_the_slots_keeps_the_throughput(
    clients, group, max_tokens, roam
):
    load = {"clients": clients, "group": group, "max_tokens": max_tokens, "roam": roam}
    # As many adapters as slots run at once in both: batches of the same sizes.
    resident = simulate(_throughput(num_slots=2, num_adapters=2, **load))
    overcommitted = simulate(_throughput(num_slots=2, num_adapters=8, **load))
    assert overcommitted >= 0.85 * resident
