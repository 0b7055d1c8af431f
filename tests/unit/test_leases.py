"""Versions come, are leased and go: nothing grows, and what a recovery needs is there again."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import func, select

from rollmesh import types
from rollmesh.blobs import Blobs
from rollmesh.errors import DigestMismatch, NotFound, Unavailable
from rollmesh.exports import write_export
from services.coordinator import retention
from services.coordinator.exporting import CHUNK_BYTES
from services.coordinator.retention import SURPLUS_GRACE_S, Retention
from services.coordinator.store import LetGo, StoreUnavailable, VersionStore, open_store
from services.coordinator.store.tables import metadata
from services.coordinator.sweeper import GRACE_S, Sweeper
from tests.fakes.mesh import BASE_MODEL, FakeTrainer
from tests.fakes.training import ADAM, DATUM, LOSS, running_core

A = "projects/p/adapters/a"
LORA = types.LoraConfig(rank=4)
RETENTION_S = 600.0


class Writing(FakeTrainer):
    """A trainer that writes what it publishes to the blob store, unless it dies before."""

    def __init__(self, blobs: Blobs) -> None:
        super().__init__()
        self.blobs = blobs
        self.dies_before_writing = False
        self.keys: set[str] = set()

    async def publish_adapter(self, name, *, epoch, with_pending_gradients=False):
        version = await super().publish_adapter(
            name, epoch=epoch, with_pending_gradients=with_pending_gradients
        )
        if version.export_key not in self.keys and not self.dies_before_writing:
            self.keys = {version.export_key}
            self.blobs.write(version.export_key, b"x")
        return version


class Samplers:
    """Forgets what it is told to; `hanging`, it never answers."""

    def __init__(self) -> None:
        self.unloaded: list[LetGo] = []
        self.hanging = False

    async def unload(self, base_model, adapter, policy_version):
        if self.hanging:
            await asyncio.Event().wait()
        self.unloaded.append(LetGo(base_model, adapter, policy_version))


@pytest.fixture
async def store(tmp_path):
    async with open_store(f"sqlite:///{tmp_path}/c.sqlite", request_retention_s=1e9) as opened:
        yield opened


@pytest.fixture
def blobs(tmp_path):
    return Blobs(str(tmp_path / "blobs"))


@pytest.fixture
def trainer(blobs):
    return Writing(blobs)


async def create(core, name=A):
    return await core.create_adapter(name, BASE_MODEL, LORA, job="", request_id=name)


async def step(core, number, name=A):
    """Train the adapter to version `number`."""
    await core.forward_backward(name, 2 * number - 1, [DATUM], LOSS, job="")
    await core.optim_step(name, 2 * number, ADAM, job="")


def version(number: int) -> types.PolicyRef:
    return types.PolicyRef(adapter=A, policy_version=number)


class OneTransaction:
    """Many transactions in one: ten thousand would wait for the disk ten thousand times."""

    def __init__(self, connection) -> None:
        self._connection = connection

    async def transact(self, work):
        return await work(self._connection)


class Memory:
    """Blobs by key."""

    def __init__(self) -> None:
        self.written: dict[str, bytes] = {}

    def keys(self, prefix):
        return [(key, 0.0) for key in self.written if key.startswith(f"{prefix}/")]

    def delete(self, key):
        self.written.pop(key, None)


class TenThousand:
    """Publishes of one adapter, one each EVERY_S; housekeeping comes once in PER_LOOK of them."""

    COUNT, PER_LOOK, EVERY_S = 10_000, 100, 10.0
    LEASED = (0, 17, 4321, 9000)
    MAX_SUPERSEDED = 64

    def __init__(self, store) -> None:
        self.now = 1e6
        self.store = store
        self.samplers = Samplers()
        self.blobs = Memory()
        self.retention = Retention(
            store.versions,
            store.leases,
            self.samplers,
            self.blobs,
            retention_s=RETENTION_S,
            max_superseded=self.MAX_SUPERSEDED,
            clock=lambda: self.now,
        )
        self.sweeper = Sweeper(
            store.references,
            store.checkpoints,
            None,
            self.blobs,
            interval_s=60,
            clock=lambda: self.now,
        )
        self.leases: list[str] = []

    async def publish(self, numbers: range) -> None:
        async def work(connection):
            versions = VersionStore(OneTransaction(connection))
            for number in numbers:
                self.now += self.EVERY_S
                published = types.PublishedVersion(number, f"d{number}", f"versions/{number:032x}")
                self.blobs.written[published.export_key] = b"x"
                await versions.publish(A, published, now=self.now)

        await self.store.versions._database.transact(work)
        for number in self.LEASED:
            if number in numbers:
                name = f"projects/p/leases/l{number}"
                await self.store.leases.create(
                    name,
                    A,
                    number,
                    expire_time=self.now + 3600,
                    max_leases=len(self.LEASED),
                    request=None,
                    now=self.now,
                )
                self.leases.append(name)

    async def look(self) -> None:
        for name in self.leases:
            await self.store.leases.renew(name, expire_time=self.now + 3600, now=self.now)
        await self.retention.look()
        await self.sweeper.sweep_blobs()

    async def sizes(self) -> tuple[int, int, int]:
        """Rows of versions and leases, and blobs."""
        versions, leases = (metadata.tables[name] for name in ("versions", "leases"))
        counts = [select(func.count()).select_from(table) for table in (versions, leases)]
        async with self.store.versions._database.read() as connection:
            rows = [(await connection.execute(count)).scalar_one() for count in counts]
        return rows[0], rows[1], len(self.blobs.written)


async def test_ten_thousand_publishes_leave_what_is_leased_and_the_newest(store, trainer, blobs):
    async with running_core(store, blobs, {"t:1": trainer}) as core:
        await create(core)
        world = TenThousand(store)
        sizes = []
        for first in range(0, world.COUNT, world.PER_LOOK):
            await world.publish(range(first, first + world.PER_LOOK))
            await world.look()
            sizes.append(await world.sizes())
        most_versions, most_leases, most_blobs = map(max, zip(*sizes, strict=True))
        held = len(world.LEASED)
        young = RETENTION_S / world.EVERY_S + 1
        # A blob has the grace from the first look on that finds it unreferenced.
        dying = GRACE_S / world.EVERY_S + 2 * world.PER_LOOK
        assert most_leases == held
        assert most_versions <= young + held
        assert most_blobs <= young + held + dying
        assert len(world.samplers.unloaded) == world.COUNT - sizes[-1][0]
        for number in world.LEASED:
            _, source = await core.resolve(version(number))
            assert (source.policy_version, source.digest) == (number, f"d{number}")
            assert source.export_key in world.blobs.written
        with pytest.raises(NotFound, match="no longer kept"):
            await core.resolve(version(18))
        for name in world.leases:
            await store.leases.delete(name, now=world.now)
        world.now += RETENTION_S
        await world.retention.look()
        await world.sweeper.sweep_blobs()
        world.now += GRACE_S
        await world.sweeper.sweep_blobs()
        assert await world.sizes() == (1, 0, 1)


async def test_a_fast_publisher_leaves_no_more_than_so_many_and_their_blobs(store, trainer, blobs):
    class Fast(TenThousand):
        EVERY_S = 0.1
        LEASED = (17,)

    async with running_core(store, blobs, {"t:1": trainer}) as core:
        await create(core)
        world = Fast(store)
        for first in range(0, 2000, world.PER_LOOK):
            await world.publish(range(first, first + world.PER_LOOK))
            await world.look()
            versions, leases, num_blobs = await world.sizes()
            assert (versions, leases) == (min(first + 100, 1 + Fast.MAX_SUPERSEDED) + 1, 1)
            dying = SURPLUS_GRACE_S / Fast.EVERY_S + 2 * world.PER_LOOK
            assert num_blobs <= versions + dying
        _, source = await core.resolve(version(17))
        assert source.export_key in world.blobs.written


class TestRecovery:
    async def test_a_version_whose_trainer_died_before_its_blob_was_written_is_there_again(
        self, store, blobs, trainer
    ):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            await core.publish_adapter(A)
            await core.snapshot(A)
            await step(core, 1)
            trainer.dies_before_writing = True
            await core.publish_adapter(A)
            await step(core, 2)
            _, before = await core.resolve(version(1))
            with pytest.raises(NotFound):
                blobs.read(before.export_key)
            trainer.dies_before_writing = False
            trainer.restart()
            await core.get_adapter(A)
            await core.forward(A, [DATUM])  # the adapter is at home
            _, after = await core.resolve(version(1))
            assert after.digest == before.digest
            assert after.export_key != before.export_key
            assert blobs.read(after.export_key) == b"x"
            # So has who resolved it before that.
            assert core.locate(before) == after

    async def test_a_version_that_was_let_go_of_is_not_published_again(self, store, blobs, trainer):
        async with running_core(store, blobs, {"t:1": trainer}) as core:
            await create(core)
            for number in range(3):
                if number:
                    await step(core, number)
                await core.publish_adapter(A)
            await store.versions.let_go(superseded_before=1e12, max_superseded=99, now=1e12)
            trainer.restart()
            await core.forward(A, [DATUM])
            assert trainer.published[A] == {2}
            assert list(await store.versions.since(A, 0)) == [2]


async def test_a_kept_version_that_its_trainer_has_dropped_is_exported_from_its_blob(
    store, blobs, trainer
):
    async with running_core(store, blobs, {"t:1": trainer}) as core:
        await create(core)
        published = await core.publish_adapter(A)
        file = b"x" * (CHUNK_BYTES + 1)
        blobs.delete(published.export_key)
        header = types.AdapterExport(A, 0, BASE_MODEL, "{}", len(file))
        write_export(blobs, published.export_key, header, published.digest, file)
        trainer.published[A].clear()
        parts = [part async for part in core.export_adapter(A, 0)]
        assert parts[0] == header
        assert b"".join(parts[1:-1]) == file
        assert parts[-1] == published.digest
        blobs.delete(published.export_key)
        with pytest.raises(NotFound, match=published.export_key):
            assert not [part async for part in core.export_adapter(A, 0)]
        write_export(blobs, published.export_key, header, "another", file)
        with pytest.raises(DigestMismatch, match=published.export_key):
            assert not [part async for part in core.export_adapter(A, 0)]


async def test_who_follows_an_adapter_hears_of_its_publication_once_it_is_stored(
    store, blobs, trainer
):
    async with running_core(store, blobs, {"t:1": trainer}) as core:
        await create(core)
        await core.publish_adapter(A)
        _, source = await core.resolve(version(0))
        newest = core.publications.follow(A)
        newest.announce(source)
        await step(core, 1)
        assert newest.source.policy_version == 0
        await core.publish_adapter(A)
        _, source = await core.resolve(version(1))
        assert newest.source == source
        assert source.export_key == trainer.export_keys[A][1]
        assert source.trainer_address == "t:1"


class TestRetention:
    def setup_method(self):
        self.now = 1000.0
        self.blobs = Memory()

    class Versions:
        """Lets go of `batches`, one after the other; what is an error is raised."""

        def __init__(self, *batches) -> None:
            self.batches = list(batches)
            self.asked: list[tuple[float, int, float]] = []

        async def let_go(self, *, superseded_before, max_superseded, now):
            self.asked.append((superseded_before, max_superseded, now))
            batch = self.batches.pop(0) if self.batches else []
            if isinstance(batch, Exception):
                raise batch
            return batch

    class NoLeases:
        async def expire(self, *, now):
            return 0

    def keeping(self, versions, samplers):
        return Retention(
            versions,
            self.NoLeases(),
            samplers,
            self.blobs,
            retention_s=RETENTION_S,
            max_superseded=7,
            clock=lambda: self.now,
        )

    async def test_samplers_hear_of_what_was_let_go_of_and_of_nothing_else(self):
        batches = [[LetGo("m", A, 1), LetGo("m", A, 2)], [LetGo("n", A, 3)]]
        samplers, versions = Samplers(), self.Versions(*batches)
        await self.keeping(versions, samplers).look()
        assert samplers.unloaded == [each for batch in batches for each in batch]
        assert versions.asked == [(400.0, 7, 1000.0)] * 3

    async def test_samplers_that_hang_cost_a_bounded_time(self, monkeypatch):
        monkeypatch.setattr(retention, "UNLOAD_S", 0.01)
        samplers = Samplers()
        samplers.hanging = True
        many = [LetGo("m", A, number) for number in range(100)]
        async with asyncio.timeout(20):
            await self.keeping(self.Versions(many, many), samplers).look()
        assert samplers.unloaded == []

    async def test_the_blob_of_a_version_that_was_too_many_goes_a_minute_later(self):
        self.blobs.written = dict.fromkeys(("versions/a", "versions/b"), b"x")
        gone = [LetGo("m", A, 1, "versions/a"), LetGo("m", A, 2)]
        keeping = self.keeping(self.Versions(gone), Samplers())
        await keeping.look()
        self.now += SURPLUS_GRACE_S - 1
        await keeping.look()
        assert set(self.blobs.written) == {"versions/a", "versions/b"}
        self.now += 1
        await keeping.look()
        assert set(self.blobs.written) == {"versions/b"}  # the sweeper's

    async def test_a_blob_store_that_is_away_stops_nothing(self, caplog):
        def away(key):
            raise Unavailable(f"no {key}")

        self.blobs.delete = away
        gone = [LetGo("m", A, 1, "versions/a")]
        keeping = self.keeping(self.Versions(gone), Samplers())
        await keeping.look()
        self.now += SURPLUS_GRACE_S
        await keeping.look()
        assert "left to the sweeper: no versions/a" in caplog.text

    async def test_so_many_blobs_are_remembered_and_no_more(self, monkeypatch):
        monkeypatch.setattr(retention, "MAX_SURPLUS", 3)
        keys = [f"versions/{number}" for number in range(5)]
        self.blobs.written = dict.fromkeys(keys, b"x")
        batches = [[LetGo("m", A, n, key)] for n, key in enumerate(keys)]
        keeping = self.keeping(self.Versions(*batches), Samplers())
        await keeping.look()
        self.now += SURPLUS_GRACE_S
        await keeping.look()
        assert list(self.blobs.written) == keys[3:]

    async def test_a_database_that_is_away_puts_it_off(self, monkeypatch):
        monkeypatch.setattr(retention, "LOOK_EVERY_S", 0.0)
        samplers = Samplers()
        versions = self.Versions(StoreUnavailable("away"), [LetGo("m", A, 1)], [], RuntimeError())
        with pytest.raises(RuntimeError):
            await self.keeping(versions, samplers).run()
        assert samplers.unloaded == [LetGo("m", A, 1)]
