"""What the sweeper lets go of, and that nothing somebody still needs is among it."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import update

from rollmesh import types
from rollmesh.blobs import Blobs
from rollmesh.errors import FailedPrecondition, NotFound, Unavailable
from rollmesh.job import JobSpec
from services.coordinator import sweeper
from services.coordinator.store import (
    JournaledOp,
    NewJob,
    Origin,
    Request,
    StoredFuture,
    open_store,
)
from services.coordinator.store.tables import adapters
from services.coordinator.sweeper import GRACE_S, Sweeper

P = "projects/p"
LORA = types.LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj",))
MINUTE_S = 60.0


class Adapters:
    """Deletes as the real ones do, without trainers; `refusals` are raised instead."""

    def __init__(self, store):
        self.store = store
        self.deleted = []
        self.refusals = {}

    async def delete_idle_adapter(self, name):
        if name in self.refusals:
            raise self.refusals[name]
        await self.store.adapters.delete(name, Request.of("p", f"idle {name}", "x"), now=0.0)
        self.deleted.append(name)


class World:
    """A store, blobs and a sweeper at a time that the test says."""

    def __init__(self, store, folder):
        self.now = 1_000_000.0
        self.store = store
        self.blobs = Blobs(str(folder))
        self.adapters = Adapters(store)
        self.sweeper = Sweeper(
            store.references,
            store.checkpoints,
            self.adapters,
            self.blobs,
            interval_s=MINUTE_S,
            clock=lambda: self.now,
        )

    async def sweep(self, after_s=0.0):
        self.now += after_s
        await self.sweeper.delete_expired()
        await self.sweeper.delete_idle()
        await self.sweeper.sweep_blobs()

    @property
    def keys(self):
        prefixes = ("snapshots", "ops", "versions", "futures")
        return {key for prefix in prefixes for key, _ in self.blobs.keys(prefix)}

    def snapshot(self, number):
        """A snapshot's blobs, and the value that a row has of it."""
        key = f"snapshots/{number:032x}"
        for name in ("adapter", "state", "manifest"):
            self.blobs.write(f"{key}/{name}", b"x")
        return types.Snapshot(key, "ab" * 32, 1, 0, 3, "cd" * 32)

    async def adapter(self, adapter, *, job="", idle_ttl_s=None, origin=None):
        name = f"{P}/adapters/{adapter}"
        request = None if job else Request.of("p", f"create {adapter}", "CreateAdapter", name)
        stored = await self.store.adapters.reserve(
            name,
            "arith",
            LORA,
            job=job,
            request=request,
            now=self.now,
            idle_ttl_s=idle_ttl_s,
            origin=origin,
        )
        stored = await self.store.adapters.give(stored, "t:1", now=self.now)
        made = types.TrainerAdapter(name, LORA, 0, 1, has_pending_gradients=False)
        return await self.store.adapters.confirm(name, job=job, made=made)

    async def checkpoint(self, stored, snapshot, *, ttl_s=None, name="c"):
        full = f"{stored.adapter.name}/checkpoints/{name}"
        await self.store.checkpoints.reserve(full, request=request(full), now=self.now)
        expire_time = None if ttl_s is None else self.now + ttl_s
        await self.store.checkpoints.complete(
            full, stored.adapter, snapshot, now=self.now, expire_time=expire_time
        )
        return full


def request(name):
    return Request.of("p", f"make {name}", "CreateCheckpoint", name)


def files(snapshot):
    return {f"{snapshot.key}/{name}" for name in ("adapter", "state", "manifest")}


@pytest.fixture
async def world(tmp_path):
    async with open_store(f"sqlite:///{tmp_path}/store.sqlite", request_retention_s=1e6) as store:
        yield World(store, tmp_path / "blobs")


class TestBlobs:
    async def test_what_no_row_refers_to_goes_after_the_grace_and_not_before(self, world):
        snapshot = world.snapshot(1)
        world.blobs.write("ops/a/1", b"x")
        await world.sweep()
        await world.sweep(GRACE_S - 1)
        assert world.keys == files(snapshot) | {"ops/a/1"}
        await world.sweep(1)
        assert world.keys == set()

    async def test_work_and_results_of_futures_stay_as_long_as_they_are_needed(self, world):
        body, result, in_vain = (f"futures/{name * 32}" for name in "abc")
        for key in (body, result, in_vain):
            world.blobs.write(key, b"x")
        name = f"{P}/futures/f"
        future = StoredFuture(name, "p", "", 0, "d", "", world.now, body_key=body)
        await world.store.futures.create(future, max_unfinished=9)
        await world.sweep()
        await world.store.futures.finish(name, None, result, now=world.now)
        await world.sweep(GRACE_S)
        assert world.keys == {body, result}  # whoever found the row before may still read it
        await world.sweep(GRACE_S)
        assert world.keys == {result}
        await world.store.futures.expire(done_before=world.now, forget_before=0.0)
        await world.sweep()
        await world.sweep(GRACE_S)
        assert world.keys == set()

    async def test_what_a_row_of_any_kind_refers_to_stays(self, world):
        first, newest, kept, origin, loaded = (world.snapshot(number) for number in range(5))
        stored = await world.adapter("a")
        await world.store.adapters.keep_snapshot(stored.adapter.name, first, epoch=stored.epoch)
        await world.store.adapters.keep_snapshot(stored.adapter.name, newest, epoch=stored.epoch)
        await world.checkpoint(stored, kept)
        await world.adapter("b", origin=Origin(origin, with_optimizer=False))
        name = stored.adapter.name
        op = JournaledOp(
            name, 1, "load_snapshot", "0" * 64, body_key="ops/a/1", snapshot_key=loaded.key
        )
        await world.store.ops.append(op, job="", now=world.now)
        for key in ("ops/a/1", "ops/a/1-result", "ops/a/2"):
            world.blobs.write(key, b"x")
        await world.store.ops.record(
            op,
            epoch=stored.epoch,
            policy_version=1,
            result=None,
            result_key="ops/a/1-result",
            now=world.now,
        )
        await world.sweep()
        await world.sweep(GRACE_S)
        needed = (newest, kept, origin, loaded)
        assert world.keys == {"ops/a/1", "ops/a/1-result"}.union(*map(files, needed))

    async def test_the_blob_of_a_version_stays_until_the_version_is_let_go_of(self, world):
        name = (await world.adapter("a")).adapter.name
        keys = [f"versions/{number:032x}" for number in range(3)]
        for number, key in enumerate(keys):
            world.blobs.write(key, b"x")
            version = types.PublishedVersion(number, "ab" * 32, key)
            await world.store.versions.publish(name, version, now=world.now)
        world.blobs.write("versions/" + "f" * 32, b"x")  # its row never came
        await world.sweep()
        await world.sweep(GRACE_S)
        assert world.keys == set(keys)
        await world.store.versions.let_go(
            superseded_before=world.now, max_superseded=9, now=world.now
        )
        await world.sweep()
        await world.sweep(GRACE_S - 1)
        assert world.keys == set(keys)  # whoever found one just before may still pull it
        await world.sweep(1)
        assert world.keys == {keys[-1]}

    async def test_a_fork_needs_what_it_was_made_of_until_it_has_a_snapshot_itself(self, world):
        origin = world.snapshot(1)
        stored = await world.adapter("a", origin=Origin(origin, with_optimizer=True))
        await world.sweep()
        await world.sweep(GRACE_S)
        assert files(origin) <= world.keys
        own = world.snapshot(2)
        await world.store.adapters.keep_snapshot(stored.adapter.name, own, epoch=stored.epoch)
        await world.sweep()
        await world.sweep(GRACE_S)
        assert world.keys == files(own)

    async def test_a_key_that_merely_begins_like_another_is_not_taken_for_it(self, world):
        stored = await world.adapter("a")
        op = JournaledOp(stored.adapter.name, 1, "x", "0" * 64, body_key="ops/a/1")
        await world.store.ops.append(op, job="", now=world.now)
        for key in ("ops/a/1", "ops/a/10"):
            world.blobs.write(key, b"x")
        await world.sweep()
        await world.sweep(GRACE_S)
        assert world.keys == {"ops/a/1"}

    async def test_a_row_written_long_after_its_blobs_finds_them(self, world):
        stored = await world.adapter("a")
        snapshot = world.snapshot(1)
        await world.sweep()
        await world.sweep(GRACE_S - 1)
        await world.checkpoint(stored, snapshot)
        await world.sweep(1)
        await world.sweep(GRACE_S)
        assert world.keys == files(snapshot)

    async def test_a_row_written_between_the_look_at_blobs_and_at_rows_keeps_its_blobs(self, world):
        stored = await world.adapter("a")
        snapshot = world.snapshot(1)
        await world.sweep()
        world.now += GRACE_S
        loop, blobs = asyncio.get_running_loop(), world.blobs

        class Listing:
            """The row comes when the sweeper has begun to look at the blobs."""

            def keys(self, prefix):
                yield from blobs.keys(prefix)
                if prefix == "snapshots":
                    coming = world.checkpoint(stored, snapshot)
                    asyncio.run_coroutine_threadsafe(coming, loop).result()

            def delete(self, key):
                blobs.delete(key)

        world.sweeper._blobs = Listing()
        await world.sweeper.sweep_blobs()
        assert world.keys == files(snapshot)

    async def test_who_read_a_row_before_it_went_can_read_its_blobs_for_the_grace(self, world):
        stored = await world.adapter("a")
        snapshot = world.snapshot(1)
        name = await world.checkpoint(stored, snapshot)
        await world.sweep()
        await world.sweep(10 * GRACE_S)  # old by now, and read by a fork that goes on slowly
        await world.store.checkpoints.delete(
            name, Request.of("p", "d", "DeleteCheckpoint", name), now=world.now
        )
        await world.sweep()
        await world.sweep(GRACE_S - 1)
        assert world.keys == files(snapshot)
        # The fork's row comes: the snapshot is needed again.
        await world.adapter("b", origin=Origin(snapshot, with_optimizer=False))
        await world.sweep(1)
        assert world.keys == files(snapshot)

    async def test_a_restart_never_makes_a_blob_go_sooner(self, world, tmp_path):
        snapshot = world.snapshot(1)
        await world.sweep()
        again = World(world.store, tmp_path / "blobs")
        again.now = world.now + GRACE_S
        await again.sweep()
        assert again.keys == files(snapshot)
        await again.sweep(GRACE_S)
        assert again.keys == set()


class TestCheckpoints:
    async def test_an_expired_checkpoint_goes_and_then_its_blobs(self, world):
        stored = await world.adapter("a")
        short, long = world.snapshot(1), world.snapshot(2)
        await world.checkpoint(stored, short, ttl_s=100.0, name="short")
        kept = await world.checkpoint(stored, long, ttl_s=1e6, name="long")
        await world.sweep(99)
        assert await world.store.references.blob_keys() == {short.key, long.key}
        await world.sweep(1)
        assert await world.store.references.blob_keys() == {long.key}
        assert world.keys == files(short) | files(long)
        await world.sweep(GRACE_S)
        assert world.keys == files(long)
        assert (await world.store.checkpoints.get(kept, now=world.now)).snapshot == long

    async def test_a_name_that_was_reserved_in_vain_is_free_after_the_grace(self, world):
        stored = await world.adapter("a")
        name = f"{stored.adapter.name}/checkpoints/c"
        await world.store.checkpoints.reserve(name, request=request(name), now=world.now)
        await world.sweep(GRACE_S)
        completed = await world.store.checkpoints.complete(
            name, stored.adapter, world.snapshot(1), now=world.now, expire_time=None
        )
        assert completed.checkpoint.name == name
        await world.store.checkpoints.reserve(f"{name}2", request=request(f"{name}2"), now=0.0)
        await world.sweep()
        with pytest.raises(NotFound):
            await world.store.checkpoints.complete(
                f"{name}2", stored.adapter, world.snapshot(2), now=world.now, expire_time=None
            )


class TestIdleAdapters:
    async def test_an_adapter_that_nobody_used_for_its_time_to_live_is_deleted(self, world):
        await world.adapter("a", idle_ttl_s=100.0)  # and a minute: uses are not noted more often
        await world.adapter("b")
        await world.sweep(159)
        assert world.adapters.deleted == []
        await world.sweep(1)
        assert world.adapters.deleted == [f"{P}/adapters/a"]
        await world.sweep(1e9)
        assert world.adapters.deleted == [f"{P}/adapters/a"]

    async def test_what_is_kept_anew_is_so_from_then_on(self, world):
        stored = await world.adapter("a")
        world.now += 60
        await world.store.adapters.keep_idle(stored.adapter.name, 100.0, now=world.now)
        await world.sweep(159)
        assert world.adapters.deleted == []
        await world.sweep(1)
        assert world.adapters.deleted == [stored.adapter.name]

    async def test_use_begins_the_time_anew(self, world):
        stored = await world.adapter("a", idle_ttl_s=100.0)
        world.now += 60
        await world.store.adapters.touch(stored.adapter.name, now=world.now)
        await world.sweep(159)
        assert world.adapters.deleted == []
        await world.sweep(1)
        assert world.adapters.deleted == [stored.adapter.name]

    @pytest.mark.parametrize("end", ["expired", "deleted"])
    async def test_an_open_lease_is_use_until_it_ends(self, world, end):
        name = (await world.adapter("a", idle_ttl_s=100.0)).adapter.name
        await world.store.versions.publish(name, types.PublishedVersion(0, "00"), now=world.now)
        lease = f"{P}/leases/l"
        await world.store.leases.create(
            lease,
            name,
            0,
            expire_time=world.now + 1000,
            max_leases=1,
            request=None,
            now=world.now,
        )
        await world.sweep(999)
        assert world.adapters.deleted == []
        if end == "deleted":
            await world.store.leases.delete(lease, now=world.now)
        else:
            world.now += 1
            await world.store.leases.expire(now=world.now)
        await world.sweep(159)
        assert world.adapters.deleted == []
        await world.sweep(1)
        assert world.adapters.deleted == [name]

    async def test_an_adapter_that_is_leased_at_the_last_moment_is_not_deleted(self, world):
        name = (await world.adapter("a")).adapter.name
        await world.store.versions.publish(name, types.PublishedVersion(0, "00"), now=world.now)
        await world.store.leases.create(
            f"{P}/leases/l",
            name,
            0,
            expire_time=world.now + 10,
            max_leases=1,
            request=None,
            now=world.now,
        )
        with pytest.raises(FailedPrecondition, match="leased"):
            await world.store.adapters.delete(name, None, now=world.now, unless_leased=True)
        await world.store.adapters.delete(name, None, now=world.now + 10, unless_leased=True)

    async def test_its_checkpoints_outlive_it(self, world):
        stored = await world.adapter("a", idle_ttl_s=100.0)
        snapshot = world.snapshot(1)
        name = await world.checkpoint(stored, snapshot)
        await world.sweep(160)
        await world.sweep(GRACE_S)
        assert world.adapters.deleted == [stored.adapter.name]
        assert (await world.store.checkpoints.get(name, now=world.now)).snapshot == snapshot
        assert world.keys == files(snapshot)

    async def test_an_adapter_of_a_job_that_has_not_ended_is_never_idle(self, world):
        spec = JobSpec.model_validate(
            {
                "base_model": "arith",
                "dataset": {"tasks": [{"fields": {"question": "1"}}]},
                "prompt": {"text": "{question}="},
                "reward": {"function": "even"},
                "stop": {"max_steps": 1},
            }
        )
        job = f"{P}/jobs/j"
        await world.store.jobs.create(
            await NewJob.of(job, "p", spec, adapter=f"{P}/adapters/a", lora=LORA),
            request=Request.of("p", "j", "CreateJob", job),
            max_pending=9,
            now=world.now,
        )
        await world.adapter("a", job=job)

        async def give_it_a_time_to_live(connection):
            await connection.execute(update(adapters).values(idle_ttl_s=100.0))

        await world.store.adapters._database.transact(give_it_a_time_to_live)
        world.now += 1e6
        now = world.now
        assert await world.store.references.idle_adapters(used_before=now, now=now) == []

    @pytest.mark.parametrize(
        "refusal", [FailedPrecondition("used"), NotFound("gone"), Unavailable("away")]
    )
    async def test_one_that_cannot_be_deleted_now_keeps_no_other(self, world, refusal):
        for name in ("a", "b"):
            await world.adapter(name, idle_ttl_s=100.0)
        world.adapters.refusals[f"{P}/adapters/a"] = refusal
        await world.sweep(160)
        assert world.adapters.deleted == [f"{P}/adapters/b"]
        world.adapters.refusals.clear()
        await world.sweep(MINUTE_S)
        assert world.adapters.deleted == [f"{P}/adapters/b", f"{P}/adapters/a"]

    async def test_one_whose_turn_does_not_come_keeps_no_other(self, world, monkeypatch):
        monkeypatch.setattr(sweeper, "DELETE_TIMEOUT_S", 0.5)
        for name in ("a", "b"):
            await world.adapter(name, idle_ttl_s=100.0)
        delete = world.adapters.delete_idle_adapter

        async def hang(name):
            if name == f"{P}/adapters/a":
                await asyncio.Event().wait()
            await delete(name)

        world.adapters.delete_idle_adapter = hang
        world.now += 160
        async with asyncio.timeout(20):
            await world.sweeper.delete_idle()
        assert world.adapters.deleted == [f"{P}/adapters/b"]


async def test_a_blob_store_that_is_away_stops_nothing_else(world, monkeypatch):
    """The loop goes on: what cannot be swept now is swept the next time."""
    await world.adapter("a", idle_ttl_s=1.0)
    world.now += 61
    sweeps = 0

    class Away:
        def keys(self, prefix):
            raise Unavailable("the blob store does not answer")

    class EnoughError(Exception):
        pass

    async def sleep(seconds):
        nonlocal sweeps
        assert seconds == MINUTE_S
        sweeps += 1
        if sweeps == 2:
            raise EnoughError

    world.sweeper._blobs = Away()
    monkeypatch.setattr("services.coordinator.sweeper.asyncio.sleep", sleep)
    with pytest.raises(EnoughError):
        await world.sweeper.run()
    assert world.adapters.deleted == [f"{P}/adapters/a"]
