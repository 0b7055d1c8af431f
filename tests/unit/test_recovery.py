"""Exactly once, whatever dies: the coordinator's training side on trainers that can be watched."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

import numpy as np
import pytest

from rollmesh import types
from rollmesh.blobs import Blobs
from rollmesh.errors import (
    AlreadyExists,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    NonFinite,
    NotFound,
    Overloaded,
    SequenceGap,
    Unavailable,
)
from services.coordinator import journal, snapshots, upkeep
from services.coordinator.recovery import send
from services.coordinator.store import open_store
from tests.fakes.coordinator import eventually
from tests.fakes.mesh import BASE_MODEL, FakeTrainer
from tests.fakes.training import Life, running_core

A = "projects/p/adapters/a"
LORA = types.LoraConfig(rank=4)
LOSS = types.LossConfig("cross_entropy")
STEP = types.OptimStep(types.AdamConfig(learning_rate=0.1))


def batch(number: int, length: int = 2) -> types.ForwardBackward:
    tokens = np.full(length, number, np.int32)
    return types.ForwardBackward([types.Datum(tokens, tokens)], LOSS)


OPS = [batch(1), STEP, batch(2), batch(3), STEP]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(upkeep, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr("services.coordinator.fleet.static.POLL_INTERVAL_S", 0.02)


@pytest.fixture
async def store(tmp_path):
    async with open_store(f"sqlite:///{tmp_path}/c.sqlite", request_retention_s=1e6) as opened:
        yield opened


@pytest.fixture
def blobs(tmp_path):
    return Blobs(str(tmp_path / "blobs"))


@pytest.fixture
def trainer():
    return FakeTrainer(max_adapters=100)


class Hanging(FakeTrainer):
    """Its polls answer, and what writes or lets go of something may not."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.writing = asyncio.Event()  # cleared: snapshots and deletions hang
        self.writing.set()
        self.num_hung = 0

    async def snapshot_adapter(self, name, *, epoch):
        await self._write()
        return await super().snapshot_adapter(name, epoch=epoch)

    async def delete_adapter(self, name, *, epoch):
        await self._write()
        await super().delete_adapter(name, epoch=epoch)

    async def _write(self):
        self.num_hung += not self.writing.is_set()
        await self.writing.wait()


def two(kind=FakeTrainer, **settings) -> dict[str, FakeTrainer]:
    trainers = {"t:1": kind(**settings), "t:2": kind(**settings)}
    trainers["t:2"].snapshots = trainers["t:1"].snapshots
    return trainers


async def create(core, name=A, *, request_id="", **options):
    return await core.create_adapter(
        name, BASE_MODEL, LORA, job="", request_id=request_id or name, **options
    )


async def train(core, sequence, op, name=A):
    return await core.train(name, sequence, op, job="")


async def train_all(core, ops=OPS, *, first=1, name=A):
    for sequence, op in enumerate(ops, first):
        await train(core, sequence, op, name)


async def undisturbed(ops=OPS):
    """The chain that a trainer comes to."""
    alone = FakeTrainer()
    await alone.create_adapter(A, LORA, epoch=1)
    for sequence, op in enumerate(ops, 1):
        if isinstance(op, types.OptimStep):
            await alone.optim_step(A, sequence, op.adam, epoch=1)
        else:
            await alone.forward_backward(A, sequence, op.data, op.loss_config, epoch=1)
    return alone.chains[A]


async def script(core, told, request_id):
    """What a client does that repeats whatever was not answered; `told` is what it knows."""

    async def call(number, work):
        if len(told) == number:
            told.append(await work())

    await call(0, lambda: create(core, request_id=request_id))
    await call(1, lambda: train(core, 1, OPS[0]))
    await call(2, lambda: train(core, 2, OPS[1]))
    await call(3, lambda: core.publish_adapter(A))
    await call(4, lambda: train(core, 3, OPS[2]))
    await call(5, lambda: core.snapshot(A))
    await core.forward(A, OPS[0].data)


async def lived_through(store, blobs, trainer, life, told, request_id):
    """Whether the client came to the end of its script before the coordinator died."""
    async with running_core(store, blobs, {"t:1": trainer}, life, snapshot_every_ops=2) as core:
        client = asyncio.ensure_future(script(core, told, request_id))
        death = asyncio.ensure_future(life.dead.wait())
        await asyncio.wait({client, death}, return_when=asyncio.FIRST_COMPLETED)
        finished = client.done()
        for task in (client, death):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return finished


@pytest.mark.parametrize("trainer_dies", [False, True], ids=["trainer lives", "trainer dies"])
async def test_a_coordinator_killed_at_any_step_loses_and_doubles_nothing(
    store, blobs, trainer_dies
):
    expected = await undisturbed(OPS[:3])
    dies_at, finished = 0, False
    while not finished:
        dies_at += 1
        trainer, told = FakeTrainer(), []
        request_id = f"r{dies_at}"
        life = Life(dies_at)
        finished = await lived_through(store, blobs, trainer, life, told, request_id)
        if trainer_dies:
            trainer.restart()
        assert await lived_through(store, blobs, trainer, Life(), told, request_id)
        assert trainer.chains == {A: expected}, f"died at step {dies_at}"
        assert trainer_dies or trainer.num_ops == 3
        adapter = (await store.adapters.get(A)).adapter
        assert (adapter.policy_version, adapter.next_sequence) == (1, 4)
        assert [told[number].policy_version for number in (2, 3)] == [1, 1]
        await store.adapters.delete(A, None, now=1.0)
    assert dies_at > 20


class TestRepeats:
    async def test_a_repeat_answers_the_stored_result_and_runs_nothing(self, store, blobs, trainer):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            first = await train(core, 1, OPS[0])
            await train(core, 2, STEP)
            trainer.away = True  # nobody needs to be asked
            again = await train(core, 1, OPS[0])
            assert again.metrics == first.metrics
            assert [list(each) for each in again.logprobs] == [[-1.0, -1.0]]
            assert await train(core, 2, STEP) == types.OptimStepResult(1, {"learning_rate": 0.1})
            assert trainer.num_ops == 2

    async def test_other_ops_gaps_and_sequences_that_are_none_change_nothing(
        self, store, blobs, trainer
    ):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            await train_all(core, OPS[:2])
            for sequence, op, error in (
                (1, batch(9), AlreadyExists),
                (2, batch(9), AlreadyExists),
                (4, STEP, SequenceGap),
                (0, STEP, InvalidRequest),
            ):
                with pytest.raises(error):
                    await train(core, sequence, op)
            with pytest.raises(NotFound):
                await train(core, 1, STEP, f"{A}x")
            assert trainer.chains[A] == await undisturbed(OPS[:2])

    @pytest.mark.parametrize(
        "refusal", [InvalidRequest("a token"), NonFinite("a loss"), InternalError("a bug")]
    )
    async def test_a_refused_op_does_not_use_up_its_sequence(self, store, blobs, trainer, refusal):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            trainer.refuses_ops = refusal
            with pytest.raises(type(refusal)):
                await train(core, 1, batch(9))
            trainer.refuses_ops = None
            assert await store.ops.tail(A) is None
            await train_all(core)
            assert trainer.chains[A] == await undisturbed()

    async def test_an_op_that_found_the_trainer_full_may_have_run_and_is_repeated(
        self, store, blobs, trainer
    ):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            trainer.refuses_ops = Overloaded("the queue")
            with pytest.raises(Overloaded):
                await train(core, 1, OPS[0])
            # As where the attempt before, whose connection broke, had begun it.
            trainer.refuses_ops = None
            stored = await store.adapters.get(A)
            await send(trainer, A, 1, OPS[0], epoch=stored.epoch)
            await train_all(core)
            assert trainer.chains[A] == await undisturbed()
            assert trainer.num_ops == len(OPS)

    async def test_what_is_published_and_kept_is_what_the_journal_has(self, store, blobs, trainer):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            await train_all(core, OPS[:2])
            # An op that the journal does not have has run there, unnoticed.
            stored = await store.adapters.get(A)
            for sequence, op in ((3, batch(9)), (4, STEP)):
                await send(trainer, A, sequence, op, epoch=stored.epoch)
            for ask in (core.publish_adapter, core.snapshot):
                with pytest.raises(Unavailable, match="in the journal"):
                    await ask(A)
                assert (await core.publish_adapter(A)).policy_version == 1
                assert trainer.chains[A] == await undisturbed(OPS[:2])
                stored = await store.adapters.get(A)
                for sequence, op in ((3, batch(9)), (4, STEP)):
                    await send(trainer, A, sequence, op, epoch=stored.epoch)

    async def test_an_op_whose_body_is_lost_or_damaged_never_runs(self, store, tmp_path, trainer):
        blobs = Blobs(str(tmp_path / "bodies"))
        large = batch(1, length=journal.MAX_ROW_BYTES)
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            trainer.away = True
            with pytest.raises(Unavailable):
                await train(core, 1, large)
            trainer.away = False
            (body,) = (path for path in (tmp_path / "bodies").rglob("*") if path.is_file())
            whole = body.read_bytes()
            body.write_bytes(whole[:-1] + b"?")
            with pytest.raises(Unavailable, match="as it was written"):
                await train(core, 1, large)
            body.unlink()
            with pytest.raises(Unavailable, match="as it was written"):
                await train(core, 1, large)
            assert trainer.num_ops == 0
            body.write_bytes(whole)
            await train(core, 1, large)
            assert trainer.num_ops == 1

    async def test_the_same_op_many_times_at_once_runs_once(self, store, blobs, trainer):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            await asyncio.gather(*(train(core, 1, OPS[0]) for _ in range(16)))
            assert trainer.num_ops == 1

    async def test_more_callers_than_may_wait_are_turned_away(self, store, blobs, trainer):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            trainer.answering.clear()
            calls = [asyncio.ensure_future(train(core, 1, OPS[0])) for _ in range(66)]
            done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            (turned_away,) = done
            assert isinstance(turned_away.exception(), Overloaded)
            trainer.answering.set()
            await asyncio.gather(*(call for call in calls if call is not turned_away))
            assert trainer.num_ops == 1

    async def test_an_op_goes_on_when_its_caller_has_left(self, store, blobs, trainer):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            trainer.answering.clear()
            call = asyncio.ensure_future(train(core, 1, OPS[0]))
            await trainer.ran.wait()
            call.cancel()
            trainer.answering.set()
            assert (await core.get_adapter(A)).next_sequence == 2
            assert (await store.ops.get(A, 1)).done


class TestTails:
    """An op that was journaled, and whose answer got lost with the trainer."""

    async def lose_an_answer(self, core, trainer, op):
        trainer.away = True
        with pytest.raises(Unavailable):
            await train(core, 1, op)
        assert (await core._store.get(A)).adapter.next_sequence == 1

    async def test_it_is_settled_before_anything_else(self, store, blobs, trainer):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            await self.lose_an_answer(core, trainer, OPS[0])
            trainer.away = False
            await train(core, 2, STEP)
            assert trainer.chains[A] == await undisturbed(OPS[:2])

    async def test_it_is_settled_though_nobody_asks(self, store, blobs, trainer):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            await self.lose_an_answer(core, trainer, OPS[0])
            trainer.away = False

            async def settled() -> bool:
                return await store.ops.tail(A) is None

            await eventually(settled)
            assert trainer.chains[A] == await undisturbed(OPS[:1])

    async def test_one_that_is_refused_leaves_its_sequence_to_another(self, store, blobs, trainer):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            trainer.refuses_ops = InvalidRequest("a token")
            await self.lose_an_answer(core, trainer, batch(9))
            trainer.away = False
            assert (await core.get_adapter(A)).next_sequence == 1
            trainer.refuses_ops = None
            await train_all(core)
            assert trainer.chains[A] == await undisturbed()

    async def test_the_same_op_with_another_body_is_no_repeat_of_one_that_ran(
        self, store, blobs, trainer
    ):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            await self.lose_an_answer(core, trainer, OPS[0])
            trainer.away = False
            with pytest.raises(AlreadyExists):
                await train(core, 1, batch(9))


class TestLargeBodies:
    async def test_they_are_blobs_and_are_replayed(self, store, blobs, trainer):
        length = journal.MAX_ROW_BYTES // 4
        ops = [batch(1, length), STEP, batch(2, length)]
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            await train_all(core, ops)
            large = await store.ops.get(A, 1)
            assert (large.body, large.result) == (None, None)
            assert sorted({large.body_key, large.result_key}) == sorted(
                {large.body_key, large.result_key} & {key for key, _ in blobs.keys("ops")}
            )
            trainer.restart()
            repeated = await train(core, 1, ops[0])
            assert len(repeated.logprobs[0]) == length
            await train(core, 4, STEP)
            assert trainer.chains[A] == await undisturbed([*ops, STEP])


class TestSnapshots:
    async def test_one_is_taken_every_few_ops_and_the_journal_cut_off(self, store, blobs, trainer):
        async with running_core(store, blobs, {"t:1": trainer}, snapshot_every_ops=2) as core:
            await create(core)
            await train_all(core)

            async def end() -> int:
                snapshot = (await store.adapters.get(A)).snapshot
                return 1 if snapshot is None else snapshot.next_sequence

            async def taken() -> bool:  # fewer than two of the five ops are in none
                return await end() >= 5

            await eventually(taken)
            cut = range(1, await end())
            assert [(await store.ops.get(A, n)).body for n in cut] == [None] * len(cut)
            num_ops, left = trainer.num_ops, 6 - await end()
            trainer.restart()
            assert await core.forward(A, batch(1).data)
            assert trainer.num_ops == num_ops + left  # nothing else was left to replay
            assert trainer.chains[A] == await undisturbed()

    async def test_large_ops_make_one_due_sooner(self, store, blobs, trainer):
        async with running_core(store, blobs, {"t:1": trainer}, snapshot_every_bytes=100) as core:
            await create(core)
            await train_all(core, [batch(1, 100), STEP])

            async def taken() -> bool:
                return (await store.adapters.get(A)).snapshot is not None

            await eventually(taken)

    async def test_one_that_fails_is_tried_again_and_costs_nothing(self, store, blobs, trainer):
        trainer.refuses_snapshots = Unavailable("the blob store is full")
        async with running_core(store, blobs, {"t:1": trainer}, snapshot_every_ops=2) as core:
            await create(core)
            await train_all(core)
            assert (await store.adapters.get(A)).snapshot is None
            with pytest.raises(Unavailable, match="full"):
                await core.snapshot(A)
            trainer.refuses_snapshots = None
            await train_all(core, [batch(4), STEP], first=6)

            async def taken() -> bool:
                return (await store.adapters.get(A)).snapshot is not None

            await eventually(taken)

    async def test_one_that_hangs_is_given_up_and_tried_again(self, store, blobs, monkeypatch):
        monkeypatch.setattr(snapshots, "TIMEOUT_S", 0.05)
        trainer = Hanging()
        async with running_core(store, blobs, {"t:1": trainer}, snapshot_every_ops=2) as core:
            await create(core)
            trainer.writing.clear()
            async with asyncio.timeout(20):
                with pytest.raises(Unavailable, match="has not written"):
                    await core.snapshot(A)
            await train_all(core)
            monkeypatch.setattr(snapshots, "TIMEOUT_S", 1000.0)
            trainer.writing.set()
            for sequence in range(6, 10):
                await train(core, sequence, STEP)

            async def taken() -> bool:
                return (await store.adapters.get(A)).snapshot is not None

            await eventually(taken)

    async def test_a_trainer_that_hangs_holds_up_no_snapshot_of_another(self, store, blobs):
        trainers = two(Hanging, max_adapters=100)
        async with running_core(store, blobs, trainers, snapshot_every_ops=1) as core:
            names = [f"{A}{number}" for number in range(2 * snapshots.NUM_AT_ONCE + 2)]
            for name in names:
                await create(core, name)
            hanging, other = trainers.values()
            assert len(hanging.adapters) > snapshots.NUM_AT_ONCE
            hanging.writing.clear()
            for name in hanging.adapters:
                await train(core, 1, STEP, name)

            async def full() -> bool:
                return hanging.num_hung == snapshots.NUM_AT_ONCE

            await eventually(full)
            (name, *_) = other.adapters
            await train(core, 1, STEP, name)

            async def taken() -> bool:
                return (await store.adapters.get(name)).snapshot is not None

            await eventually(taken)

    async def test_a_fork_begins_with_its_snapshot_also_when_it_is_recovered(
        self, store, blobs, trainer
    ):
        fork = f"{A}-fork"
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            await train_all(core)
            _, snapshot = await core.snapshot(A)
            assert snapshot.next_sequence == 6
            made = await create(core, fork, fork_of=snapshot, with_optimizer=True)
            assert (made.policy_version, made.next_sequence) == (0, 1)
            await train(core, 1, batch(7), fork)
            await core.train(fork, 2, STEP, job="")
            await core.train(fork, 3, types.LoadSnapshot(snapshot, with_optimizer=False), job="")
            chain = trainer.chains[fork]
            trainer.restart()
            assert (await core.publish_adapter(fork)).policy_version == 2
            assert trainer.chains[fork] == chain


class TestOwnership:
    async def test_a_dead_trainers_adapters_go_to_another_after_its_lease(self, store, blobs):
        trainers = two()
        async with running_core(store, blobs, trainers, trainer_lease_s=0.1) as core:
            await create(core)
            await train_all(core)
            owner, other = _owner_first(trainers)
            published = await core.publish_adapter(A)
            _, before = await core.resolve(types.PolicyRef(adapter=A))
            owner.away = True

            async def moved() -> bool:
                return A in other.chains and other.published.get(A) == {published.policy_version}

            await eventually(moved)
            await train(core, 6, batch(6))
            assert other.chains[A] == await undisturbed([*OPS, batch(6)])
            owner.away = False  # it was only cut off

            async def freed() -> bool:
                return A not in owner.adapters

            await eventually(freed)
            _, source = await core.resolve(types.PolicyRef(adapter=A))
            assert trainers[source.trainer_address] is other
            assert core.locate(before) == source  # also for who asked before it moved

    async def test_nothing_moves_before_the_lease_is_over(self, store, blobs):
        trainers = two()
        async with running_core(store, blobs, trainers) as core:
            await create(core)
            owner, other = _owner_first(trainers)
            owner.away = True
            with pytest.raises(Unavailable):
                await train(core, 1, OPS[0])
            assert not other.adapters
            owner.away = False
            await train(core, 1, OPS[0])
            assert owner.chains[A] == await undisturbed(OPS[:1])

    async def test_what_a_cut_off_trainer_answers_late_is_not_heard(self, store, blobs):
        trainers = two()
        async with running_core(store, blobs, trainers, trainer_lease_s=0.1) as core:
            await create(core)
            owner, other = _owner_first(trainers)
            owner.answering.clear()
            call = asyncio.ensure_future(train(core, 1, OPS[0]))
            await owner.ran.wait()
            owner.away = True
            async with asyncio.timeout(20):
                with pytest.raises(Unavailable, match="not heard of"):
                    await call
            owner.answering.set()
            await train_all(core, OPS[1:], first=2)
            assert other.chains[A] == await undisturbed()
            assert owner.chains[A] == await undisturbed(OPS[:1])  # and went no further
            owner.away = False

            async def freed() -> bool:
                return A not in owner.adapters

            await eventually(freed)

    async def test_a_draining_trainers_adapters_move_at_once(self, store, blobs):
        trainers = two()
        async with running_core(store, blobs, trainers) as core:
            await create(core)
            await train_all(core)
            owner, other = _owner_first(trainers)
            owner.draining = True

            async def moved() -> bool:
                return A in other.chains and A not in owner.chains

            await eventually(moved)
            assert other.chains[A] == await undisturbed()
            assert other.num_ops == 0  # it came with a fresh snapshot
            await create(core, f"{A}2")
            assert list(owner.adapters) == []

    async def test_so_does_one_that_is_never_at_rest(self, store, blobs):
        trainers = two()
        async with running_core(store, blobs, trainers) as core, asyncio.TaskGroup() as tasks:
            await create(core)
            owner, other = _owner_first(trainers)
            ops, moved = [], asyncio.Event()

            async def client() -> None:
                calls = deque()
                while not moved.is_set():
                    ops.append(STEP)
                    calls.append(tasks.create_task(train(core, len(ops), STEP)))
                    if len(calls) > 3:
                        await calls.popleft()
                await asyncio.gather(*calls)

            async def has_moved() -> bool:
                return A in other.chains and A not in owner.chains

            training = tasks.create_task(client())
            await owner.ran.wait()
            owner.draining = True
            try:
                await eventually(has_moved)
            finally:
                moved.set()
                await training
            assert other.chains[A] == await undisturbed(ops)

    async def test_an_adapter_that_has_moved_does_not_wait_for_a_former_trainer_that_hangs(
        self, store, blobs, monkeypatch
    ):
        monkeypatch.setattr(snapshots, "TIMEOUT_S", 0.05)
        trainers = two(Hanging)
        async with running_core(store, blobs, trainers) as core:
            await create(core)
            owner, other = _owner_first(trainers)
            owner.writing.clear()
            owner.draining = True

            async def let_go_of() -> bool:
                return A in other.chains and owner.num_hung > 1  # the snapshot, the deletion

            await eventually(let_go_of)
            async with asyncio.timeout(20):
                await train_all(core)
            other.restart()  # and it is mended there

            async def mended() -> bool:
                return other.chains.get(A) == await undisturbed()

            await eventually(mended)

    async def test_a_trainer_that_hangs_holds_up_no_adapter_of_another(self, store, blobs):
        trainers = two(max_adapters=100)
        async with running_core(store, blobs, trainers) as core:
            for number in range(2 * upkeep.NUM_AT_ONCE + 2):
                await create(core, f"{A}{number}")
            hanging, other = trainers.values()
            assert len(hanging.adapters) > upkeep.NUM_AT_ONCE
            held = set(other.adapters)
            hanging.creating.clear()
            hanging.asked.clear()
            hanging.restart()
            await hanging.asked.wait()
            other.restart()

            async def mended() -> bool:
                return set(other.adapters) == held

            await eventually(mended)

    async def test_with_no_other_trainer_a_draining_one_goes_on(self, store, blobs, trainer):
        trainer.draining = False
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            trainer.draining = True
            await train_all(core)
            assert trainer.chains[A] == await undisturbed()

    async def test_adapters_wait_for_their_trainer_where_no_other_has_room(self, store, blobs):
        trainers = two(max_adapters=1)
        async with running_core(store, blobs, trainers, trainer_lease_s=0.1) as core:
            await create(core)
            owner, other = _owner_first(trainers)
            await create(core, f"{A}2")
            owner.restart()
            owner.away = True
            with pytest.raises(Unavailable):
                await train(core, 1, OPS[0])
            owner.away = False

            async def back() -> bool:
                return list(owner.adapters) == [A]

            await eventually(back)
            await train_all(core)
            assert owner.chains[A] == await undisturbed()
            assert list(other.adapters) == [f"{A}2"]

    async def test_what_a_creation_that_was_cut_off_left_behind_is_freed(
        self, store, blobs, trainer
    ):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            trainer.creating.clear()
            creation = asyncio.ensure_future(create(core))
            await trainer.asked.wait()
            stored = await store.adapters.get(A)
            trainer.creating.set()
            creation.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await creation
            # The answer was on its way: the trainer has it, and nobody knows.
            await trainer.create_adapter(A, LORA, epoch=stored.epoch)

            async def freed() -> bool:
                return not trainer.adapters

            await eventually(freed)

    async def test_a_restarted_coordinator_moves_and_replays_nothing_without_need(
        self, store, blobs, trainer
    ):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            await train_all(core)
            epoch = trainer.adapters[A].epoch
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await train(core, 6, batch(6))
            assert trainer.adapters[A].epoch == epoch
            assert trainer.num_ops == len(OPS) + 1

    async def test_a_trainer_that_has_something_else_is_given_what_the_journal_says(
        self, store, blobs, trainer
    ):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            await train_all(core)
            epoch = trainer.adapters[A].epoch
            await trainer.optim_step(A, 6, STEP.adam, epoch=epoch)  # the journal has no such op
            await train(core, 6, batch(6))
            assert trainer.chains[A] == await undisturbed([*OPS, batch(6)])

    @pytest.mark.parametrize("snapshot", ["before the gradients", "with them", "after the version"])
    async def test_a_version_published_while_gradients_are_pending_is_there_after_a_recovery(
        self, store, blobs, trainer, snapshot
    ):
        async with running_core(store, blobs, {"t:1": trainer}, snapshot_every_ops=1000) as core:
            await create(core)
            await train_all(core, OPS[:2])
            if snapshot == "before the gradients":
                await core.snapshot(A)
            await train(core, 3, OPS[2])
            if snapshot == "with them":
                await core.snapshot(A)
            with pytest.raises(FailedPrecondition, match="pending"):
                await core.publish_adapter(A)
            published = await core.publish_adapter(A, with_pending_gradients=True)
            if snapshot == "after the version":
                await core.snapshot(A)
            trainer.restart()
            await train(core, 4, STEP)
            _, source = await core.resolve(types.PolicyRef(adapter=A))
            assert (source.policy_version, source.digest) == (1, published.digest)
            assert trainer.published[A] == {1}
            assert trainer.export_keys[A][1] == core.locate(source).export_key
            assert trainer.chains[A] == await undisturbed([*OPS[:3], STEP])

    async def test_a_replay_that_comes_to_other_weights_is_told_and_goes_no_further(
        self, store, blobs, trainer, caplog
    ):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            await train_all(core)
            version = await core.publish_adapter(A)
            trainer.restart()
            trainer.digests[A, version.policy_version] = "f" * 64
            for _ in range(2):
                with pytest.raises(FailedPrecondition, match="cannot be recovered"):
                    await train(core, 6, batch(6))
            assert version.digest in caplog.text
            assert "f" * 64 in caplog.text
            assert (await core.get_adapter(A)).next_sequence == 6
            await core.delete_adapter(A, request_id="d")


def _owner_first(trainers):
    return sorted(trainers.values(), key=lambda trainer: A not in trainer.adapters)
