"""Work in order and exactly once, whatever dies: the futures' queues on a trainer in memory."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools

import pytest

from rollmesh.api.coordinator.v1 import future_service_pb2 as pb
from rollmesh.blobs import Blobs
from services.coordinator import upkeep
from services.coordinator.servicers.work import work_from_pb
from services.coordinator.store import StoredFuture, open_store
from tests.fakes.futures import (
    A,
    P,
    batch_work,
    create_work,
    keep_work,
    refused_work,
    running_queues,
    step_work,
)
from tests.fakes.mesh import FakeTrainer
from tests.fakes.training import Life


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


async def put(queues, bodies, store, name, message, *, queue="", position=0, now=1.0):
    """As Futures.create does it; a repeat is fine."""
    name, project = f"{P}/futures/{name}", "p"
    work = work_from_pb(name, message)
    future = StoredFuture(
        name=name,
        project=project,
        queue=queue,
        position=position,
        digest=hashlib.sha256(work.body).hexdigest(),
        adapter=work.adapter,
        create_time=now,
    )
    body, key = await bodies.put(work.body)
    future = dataclasses.replace(future, body=body, body_key=key)
    stored = await store.create(future, max_unfinished=1000)
    if not stored.done and queues:
        queues.begin(project, queue, name)
    return name


async def result(bodies, store, changes, name):
    async with asyncio.timeout(60):
        while True:
            changed = changes.next(name)
            stored = await store.get(name)
            if stored.done:
                return pb.Future.FromString(await bodies.get(stored.result, stored.result_key))
            await changed.wait()


def script(number):
    return [
        create_work(),
        batch_work(1),
        refused_work(),
        step_work(),
        keep_work(checkpoint=f"{A}/checkpoints/c{number}"),
        batch_work(2),
    ]


async def lived_through(store, blobs, trainer, life, number):
    """The results, where all work was done before the coordinator died; else None."""

    async def client():
        queue = f"q{number}"
        names = [
            await put(queues, bodies, futures, f"{queue}-{at}", work, queue=queue, position=at)
            for at, work in enumerate(script(number))
        ]
        return [await result(bodies, futures, changes, name) for name in names]

    async with running_queues(store, blobs, trainer, life) as (queues, bodies, futures, changes):
        return await outlived(client(), life)


async def outlived(work, life):
    """What `work` answers; None: the coordinator died before."""
    asking = asyncio.ensure_future(work)
    death = asyncio.ensure_future(life.dead.wait())
    await asyncio.wait({asking, death}, return_when=asyncio.FIRST_COMPLETED)
    found = asking.result() if asking.done() else None
    for task in (asking, death):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    return found


@pytest.mark.timeout(600)
async def test_a_coordinator_killed_at_any_step_does_all_work_once(store, blobs, monkeypatch):
    monkeypatch.setattr("services.coordinator.bodies.MAX_ROW_BYTES", 60)  # both ways
    chains = set()
    for number in itertools.count(1):
        trainer, life = FakeTrainer(), Life(number)
        finished = await lived_through(store, blobs, trainer, life, number)
        trainer_dies = bool(number % 2)
        if trainer_dies:
            trainer.restart()
        found = await lived_through(store, blobs, trainer, Life(), number)
        kinds = [each.WhichOneof("result") for each in found]
        told = f"died at step {number}: {found}"
        assert kinds == [
            "create_adapter",
            "forward_backward",
            "failure",
            "optim_step",
            "kept",
            "forward_backward",
        ], told
        assert found[3].optim_step.policy_version == 1, told
        assert found[4].kept.policy.policy_version == 1, told
        assert found[4].kept.lease.policy_version == 1, told
        assert found[4].kept.checkpoint.policy_version == 1, told
        adapter = (await store.adapters.get(A)).adapter
        assert (adapter.policy_version, adapter.next_sequence) == (1, 4), told
        assert trainer_dies or trainer.num_ops == 3, told
        chains.add(trainer.chains[A])
        await store.adapters.delete(A, None, now=1.0)
        if finished is not None:
            break
    assert len(chains) == 1
    assert number > 50


@pytest.mark.timeout(600)
async def test_equal_ops_are_told_apart_whenever_a_coordinator_dies(store, blobs):
    """Two that nothing orders and nothing tells apart but their names."""

    async def client():
        made = await put(queues, bodies, futures, f"a{number}", create_work())
        await result(bodies, futures, changes, made)
        # A successor takes them up the other way round.
        twins = [
            await put(queues, bodies, futures, f"{twin}{number}", step_work(), now=now)
            for twin, now in (("x", 3.0), ("y", 2.0))
        ]
        return [await result(bodies, futures, changes, name) for name in twins]

    for number in itertools.count(1):
        trainer, lives = FakeTrainer(), (Life(number), Life())
        for life in lives:
            async with running_queues(store, blobs, trainer, life) as parts:
                queues, bodies, futures, changes = parts
                found = await outlived(client(), life)
        versions = sorted(each.optim_step.policy_version for each in found)
        assert versions == [1, 2], f"died at step {number}"
        assert trainer.num_ops == 2
        await store.adapters.delete(A, None, now=1.0)
        if not lives[0].dead.is_set():
            break
    assert number > 20


async def test_an_op_whose_sequence_went_to_another_is_done_with_the_next(store, blobs):
    trainer = FakeTrainer()
    async with running_queues(store, blobs, trainer) as (queues, bodies, futures, changes):
        await result(
            bodies, futures, changes, await put(queues, bodies, futures, "a", create_work())
        )
        # It was given its sequence, and before it was tried somebody else came.
        late = await put(None, bodies, futures, "late", step_work(1.0))
        await store.futures.assign(late, 1)
        other = await put(queues, bodies, futures, "other", step_work(2.0))
        found = await result(bodies, futures, changes, other)
        assert found.optim_step.policy_version == 1
        queues.begin("p", "", late)
        found = await result(bodies, futures, changes, late)
        assert found.optim_step.policy_version == 2
        assert found.optim_step.metrics["learning_rate"] == 1.0


async def test_work_that_is_lost_or_fails_by_a_bug_fails_and_lets_the_next_go_on(
    store, blobs, monkeypatch
):
    monkeypatch.setattr("services.coordinator.bodies.MAX_ROW_BYTES", 1)
    async with running_queues(store, blobs, FakeTrainer()) as (queues, bodies, futures, changes):

        async def bug(*_args):
            raise ZeroDivisionError

        # Before there is any work, which may be found at once.
        queues._works._calls["create_adapter"] = bug
        lost = await put(None, bodies, futures, "lost", create_work(), queue="q")
        blobs.delete((await store.futures.get(lost)).body_key)
        broken = await put(None, bodies, futures, "broken", create_work(), queue="q", position=1)
        last = await put(None, bodies, futures, "last", refused_work(), queue="q", position=2)
        queues.begin("p", "q", lost)
        reasons = [
            (await result(bodies, futures, changes, name)).failure.reason
            for name in (lost, broken, last)
        ]
        assert reasons == ["INTERNAL", "INTERNAL", "INVALID_REQUEST"]
