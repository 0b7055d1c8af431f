"""Published versions in the blob store: all of them, beside the ops, and within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest

from rollmesh.blobs import Blobs
from rollmesh.errors import Unavailable
from rollmesh.exports import StoredExport
from rollmesh.types import AdamConfig, AdapterExport, LoraConfig, LossConfig
from services.trainer import exports as exports_module
from services.trainer.export import AdapterVersion
from services.trainer.exports import MAX_UNWRITTEN, MAX_UNWRITTEN_EACH, NUM_THREADS, Exports
from tests.fakes.tiny_qwen3 import batch, tiny_adapters

A = "projects/p/adapters/a"
B = "projects/p/adapters/b"
LIMIT_S = 30.0


class Store(Blobs):
    """Writes while `open` is set; raises the next of `errors` instead.

    Attributes:
        outage: what begins so is not written.
        holds: what begins otherwise is written in any case.
        written: keys, in their order.
        begun: is set when a write begins.
        at_once: most writes that were under way at a time.
    """

    def __init__(self, folder) -> None:
        super().__init__(str(folder))
        self.open = threading.Event()
        self.open.set()
        self.begun = threading.Event()
        self.holds = ""
        self.outage = None
        self.written = []
        self.errors = []
        self.at_once = 0
        self._lock = threading.Lock()
        self._under_way = 0

    def write(self, key, *parts):
        with self._lock:
            self._under_way += 1
            self.at_once = max(self.at_once, self._under_way)
        self.begun.set()
        assert not key.startswith(self.holds) or self.open.wait(LIMIT_S)
        with self._lock:
            self._under_way -= 1
            error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        if self.outage is not None and key.startswith(self.outage):
            raise Unavailable("out of service")
        super().write(key, *parts)
        self.written.append(key)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    yield store
    store.open.set()


def version(number: int, name: str = A) -> AdapterVersion:
    file = b"%d" % number * 100
    return AdapterVersion(
        AdapterExport(name, number, "tiny", "{}", len(file)), file, f"{number:064}"
    )


def ids():
    count = iter(range(10**6))
    return lambda: f"{next(count):032x}"


@contextlib.asynccontextmanager
async def with_a(store):
    async with tiny_adapters(blobs=store) as adapters:
        await adapters.create(A, LoraConfig(2), epoch=1)
        yield adapters


async def train(adapters, step, *, name=A) -> None:
    adapter = adapters.get(name)
    loss = LossConfig("importance_sampling")
    await adapter.forward_backward(1, 2 * step + 1, batch((4,)), loss)
    await adapter.optim_step(1, 2 * step + 2, AdamConfig(1e-2))


async def settled() -> None:
    """Let everything that can run do so."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_publishing_does_not_wait_for_the_store_until_too_many_are_unwritten(store):
    exports = Exports(store, new_id=ids())
    store.open.clear()
    named = [(number, f"{A}{number % MAX_UNWRITTEN}") for number in range(2 * MAX_UNWRITTEN)]
    keys = [await exports.write(version(*each)) for each in named[:MAX_UNWRITTEN]]
    others = [asyncio.create_task(exports.write(version(*each))) for each in named[MAX_UNWRITTEN:]]
    await settled()
    assert not any(other.done() for other in others)
    store.open.set()
    keys += await asyncio.gather(*others)
    await exports.close(LIMIT_S)
    assert store.at_once == NUM_THREADS
    assert len(set(keys)) == 2 * MAX_UNWRITTEN
    for each, key in zip(named, keys, strict=True):
        stored, expected = StoredExport(store, key), version(*each)
        assert (stored.export, stored.digest) == (expected.header, expected.digest)
        assert stored.read(0, stored.export.num_bytes) == expected.file


async def test_one_that_publishes_all_the_time_on_a_slow_store_holds_nobody_else_up(store):
    exports = Exports(store, new_id=ids())
    store.open.clear()
    many = [
        asyncio.create_task(exports.write(version(number))) for number in range(3 * MAX_UNWRITTEN)
    ]
    await settled()
    assert [task.done() for task in many].count(True) == MAX_UNWRITTEN_EACH
    assert await exports.write(version(0, B))
    store.open.set()
    await asyncio.gather(*many)
    await exports.written(B)
    assert len(store.written) > len(many) // 2
    await exports.close(LIMIT_S)


async def test_who_waits_for_room_gets_it_in_turn(store):
    exports = Exports(store, new_id=ids())
    store.open.clear()
    for number in range(MAX_UNWRITTEN):
        await exports.write(version(0, f"{A}{number}"))
    begun = []

    async def write(name):
        await exports.write(version(1, name))
        begun.append(name)

    # Who is unwritten already waits no shorter than who came first.
    names = [f"{A}0", B, f"{A}1", f"{A}x"]
    async with asyncio.TaskGroup() as tasks:
        for name in names:
            tasks.create_task(write(name))
        await settled()
        assert begun == []
        store.open.set()
    assert begun == names
    await exports.close(LIMIT_S)


async def test_a_store_that_is_behind_for_too_long_is_told_to_who_publishes(store, monkeypatch):
    monkeypatch.setattr(exports_module, "WAIT_S", 0.01)
    exports = Exports(store, new_id=ids())
    store.open.clear()
    for number in range(MAX_UNWRITTEN_EACH):
        await exports.write(version(number))
    with pytest.raises(Unavailable, match=f"the blob store.*{A}"):
        await exports.write(version(9))
    store.open.set()
    await exports.close(LIMIT_S)
    assert len(store.written) == MAX_UNWRITTEN_EACH


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (Unavailable("full"), "a published version is not in the blob store yet: full"),
        (RuntimeError("the driver's bug"), "bug while writing a published version"),
    ],
)
async def test_what_a_store_did_not_take_is_written_when_it_does_again(
    store, caplog, monkeypatch, error, told
):
    monkeypatch.setattr(exports_module, "FIRST_RETRY_S", 0.001)
    store.errors = [error] * 5
    exports = Exports(store, new_id=ids())
    keys = [await exports.write(version(number)) for number in range(MAX_UNWRITTEN_EACH + 1)]
    await exports.written(A)
    assert caplog.text.count(told) == 5
    assert sorted(key for key, _ in store.keys("versions")) == sorted(keys)
    await exports.close(LIMIT_S)


async def test_what_is_not_written_at_the_end_is_not_tried_again(store, caplog):
    store.errors = [Unavailable("full")] * 99
    exports = Exports(store, new_id=ids())
    await exports.write(version(0))
    await exports.close(0.01)
    assert "1 published versions are not in the blob store" in caplog.text


async def test_there_is_no_snapshot_while_an_earlier_version_is_not_written(store, monkeypatch):
    monkeypatch.setattr(exports_module, "WAIT_S", 0.01)
    monkeypatch.setattr(exports_module, "FIRST_RETRY_S", 0.001)
    async with with_a(store) as adapters:
        await adapters.create(B, None, epoch=1, fork_of=await adapters.get(A).snapshot(1))
        store.outage = "versions/"
        published = await adapters.get(A).publish(1)
        await train(adapters, 0)
        for _ in range(2):
            with pytest.raises(Unavailable, match="the blob store"):
                await adapters.get(A).snapshot(1)
        assert await adapters.get(B).snapshot(1)  # another adapter's versions are its own affair
        store.outage = None
        monkeypatch.setattr(exports_module, "WAIT_S", LIMIT_S)
        assert (await adapters.get(A).snapshot(1)).policy_version == 1
        assert StoredExport(store, published.export_key).digest == published.digest


async def test_at_the_end_what_is_written_within_the_time_is_and_nobody_waits_for_ever(
    store, caplog
):
    exports = Exports(store, new_id=ids())
    store.open.clear()
    for number in range(MAX_UNWRITTEN_EACH):
        await exports.write(version(number))
    waiting = asyncio.create_task(exports.write(version(MAX_UNWRITTEN_EACH)))
    await settled()
    await exports.close(0.01)
    with pytest.raises(Unavailable):
        await waiting
    assert "not in the blob store" in caplog.text


async def test_ops_and_publishes_go_on_while_the_store_is_slow(store):
    async with with_a(store) as adapters:
        store.open.clear()
        published = [await adapters.get(A).publish(1)]
        for step in range(MAX_UNWRITTEN_EACH - 1):
            await train(adapters, step)
            published.append(await adapters.get(A).publish(1))
        await asyncio.to_thread(store.begun.wait, LIMIT_S)
        assert not list(store.keys("versions"))
        assert await adapters.get(A).publish(1) == published[-1]
        adapters.delete(A, epoch=1)
        store.open.set()
    assert {key for key, _ in store.keys("versions")} == {each.export_key for each in published}
    for each in published:
        stored = StoredExport(store, each.export_key)
        assert (stored.export.policy_version, stored.digest) == (each.policy_version, each.digest)


async def test_a_snapshot_is_there_once_what_was_published_before_it_is_written(store):
    """Recovery would begin behind those, and publish none of them again."""
    store.holds = "versions/"
    async with with_a(store) as adapters:
        store.open.clear()
        published = await adapters.get(A).publish(1)
        await train(adapters, 0)
        writing = asyncio.create_task(adapters.get(A).snapshot(1))
        while not any(key.endswith("/manifest") for key in store.written):
            await asyncio.to_thread(time.sleep, 0.001)
        for _ in range(10):
            await asyncio.to_thread(time.sleep, 0)
        await settled()
        assert not writing.done()
        store.open.set()
        assert (await writing).policy_version == 1
        assert [key for key, _ in store.keys("versions")] == [published.export_key]


async def test_a_version_published_in_another_life_has_another_key(store):
    published = []
    for _ in range(2):
        async with with_a(store) as adapters:
            published.append(await adapters.get(A).publish(1))
    first, second = published
    assert first.digest == second.digest
    assert first.export_key != second.export_key
    assert StoredExport(store, second.export_key).digest == second.digest


async def test_a_publish_that_waits_for_the_store_holds_up_its_own_adapter_alone(store):
    async with with_a(store) as adapters:
        await adapters.create(B, None, epoch=1, fork_of=await adapters.get(A).snapshot(1))
        store.open.clear()
        for step in range(MAX_UNWRITTEN_EACH):
            await adapters.get(A).publish(1)
            await train(adapters, step)
        waiting = asyncio.create_task(adapters.get(A).publish(1))
        await train(adapters, 0, name=B)
        assert not waiting.done()
        store.open.set()
        assert (await waiting).policy_version == MAX_UNWRITTEN_EACH
    assert len(list(store.keys("versions"))) == MAX_UNWRITTEN_EACH + 1
