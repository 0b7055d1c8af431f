"""Hot swap without an engine: what is pulled, loaded, kept and freed, and when."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from dataclasses import replace

import pytest

from rollmesh.digest import safetensors_digest
from rollmesh.errors import (
    CapacityExhausted,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    MeshError,
    NotFound,
    Overloaded,
    SourceUnavailable,
    Unavailable,
)
from rollmesh.types import AdapterExport, AdapterSource, LoadTimes
from services.sampler import adapters as module
from services.sampler.adapters import Adapters

A = "projects/p/adapters/a"
B = "projects/p/adapters/b"


def tensors(value: float) -> bytes:
    """A safetensors file of one number."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + struct.pack("<f", value)


class World:
    """A trainer with any version of any adapter, and an engine; both do as they are told.

    Attributes:
        go: transfers end only while it is set.
        pulled: the versions that were asked for, in order.
        loaded: what the engine has: number of each adapter and its folder.
        error: what the next load raises.
        trainer_error: what the next transfer raises in the middle.
    """

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()
        self.pulled: list[tuple[str, int]] = []
        self.loaded = {}
        self.error: Exception | None = None
        self.trainer_error: Exception | None = None
        self.weights = {}

    def source(self, version: int, adapter: str = A, weights: float | None = None):
        value = float(version) if weights is None else weights
        source = AdapterSource(adapter, version, safetensors_digest(tensors(value)), "trainer:1")
        self.weights[source] = value
        return source

    async def pull(self, source):
        self.pulled.append((source.adapter, source.policy_version))
        data = tensors(self.weights[source])
        config = json.dumps({"r": 8})
        yield AdapterExport(source.adapter, source.policy_version, "base", config, len(data))
        await self.go.wait()
        if self.trainer_error is not None:
            error, self.trainer_error = self.trainer_error, None
            raise error
        yield data
        yield safetensors_digest(data)

    async def load(self, adapter) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        assert adapter.number not in self.loaded
        assert (adapter.folder / "adapter_model.safetensors").exists()
        self.loaded[adapter.number] = adapter.folder

    async def unload(self, adapter) -> None:
        assert self.loaded.pop(adapter.number).exists()


@pytest.fixture
def world():
    return World()


@pytest.fixture
async def adapters(world, tmp_path):
    opened = Adapters(world, world.pull, tmp_path, base_model="base", max_rank=8, max_versions=3)
    async with opened:
        yield opened


async def settled() -> None:
    """Let everything that can run do so."""
    for _ in range(50):
        await asyncio.sleep(0)


async def started(coroutine) -> asyncio.Task:
    task = asyncio.ensure_future(coroutine)
    await settled()
    return task


async def holding(adapters, source, release: asyncio.Event) -> asyncio.Task:
    """A request that uses `source` now and until `release`; its result: the number it used."""
    using = asyncio.Event()

    async def hold() -> int:
        async with adapters.use(source) as adapter:
            using.set()
            await release.wait()
            return adapter.number

    task = asyncio.ensure_future(hold())
    await using.wait()
    return task


async def test_a_version_is_pulled_and_loaded_once_however_many_ask(world, adapters):
    world.go.clear()
    asking = [await started(adapters.ensure(world.source(1))) for _ in range(5)]
    world.go.set()
    times = await asyncio.gather(*asking)
    assert world.pulled == [(A, 1)]
    assert all(each.pull_s > 0 for each in times)
    assert await adapters.ensure(world.source(1)) == LoadTimes(0.0, 0.0)
    assert adapters.live() == (replace(world.source(1), trainer_address=""),)


async def test_a_caller_that_gives_up_does_not_spoil_it_for_the_others(world, adapters):
    world.go.clear()
    first = await started(adapters.ensure(world.source(1)))
    second = await started(adapters.ensure(world.source(1)))
    first.cancel()
    world.go.set()
    await second
    assert world.pulled == [(A, 1)]
    assert first.cancelled()


async def test_what_nobody_waits_for_any_more_is_kept(world, adapters):
    world.go.clear()
    only = await started(adapters.ensure(world.source(1)))
    only.cancel()
    await settled()
    world.go.set()
    await adapters.ensure(world.source(1))
    assert world.pulled == [(A, 1)]


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (FailedPrecondition("the engine refuses"), FailedPrecondition),
        (Unavailable("the engine is dead"), Unavailable),
        (RuntimeError("a bug"), InternalError),
    ],
)
async def test_a_failed_load_is_told_to_all_who_wait_and_then_forgotten(
    world, adapters, tmp_path, raised, told
):
    world.error = raised
    world.go.clear()
    asking = [await started(adapters.ensure(world.source(1))) for _ in range(3)]
    world.go.set()
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(result) for result in results] == [told] * 3
    await adapters.unload(A, None)
    assert not list(tmp_path.iterdir())
    await adapters.ensure(world.source(1))
    assert len(world.loaded) == 1


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (Unavailable("gone"), SourceUnavailable),
        (DeadlineExceeded("slow"), SourceUnavailable),
        (InternalError("a bug over there"), SourceUnavailable),
        (NotFound("kept no longer"), NotFound),
    ],
)
async def test_a_trainer_that_fails_is_told_as_its_failure_and_not_the_samplers(
    world, adapters, raised, told
):
    world.trainer_error = raised
    with pytest.raises(MeshError, match=str(raised)) as caught:
        await adapters.ensure(world.source(1))
    assert type(caught.value) is told
    await adapters.ensure(world.source(1))


async def test_a_transfer_that_stalls_is_given_up(world, adapters, monkeypatch):
    monkeypatch.setattr(module, "STALL_S", 0.01)
    world.go.clear()
    with pytest.raises(SourceUnavailable, match="brought nothing"):
        await adapters.ensure(world.source(1))
    world.go.set()
    await adapters.ensure(world.source(1))


async def test_a_full_disk_is_told_and_survived(world, tmp_path):
    folder = tmp_path / "cache"
    adapters = Adapters(world, world.pull, folder, base_model="base", max_rank=8, max_versions=3)
    async with adapters:
        with pytest.raises(CapacityExhausted, match="cache_dir"):
            await adapters.ensure(world.source(1))
        folder.mkdir()
        await adapters.ensure(world.source(1))


async def test_unloading_waits_until_no_request_uses_it(world, adapters, tmp_path):
    release = asyncio.Event()
    request = await holding(adapters, world.source(1), release)
    unloading = await started(adapters.unload(A, 1))
    assert not unloading.done()
    assert len(world.loaded) == 1
    assert adapters.live() == ()
    release.set()
    await request
    await unloading
    assert world.loaded == {}
    assert not list(tmp_path.iterdir())


async def test_a_request_that_comes_while_it_is_unloaded_pulls_it_anew(world, adapters):
    release = asyncio.Event()
    old = await holding(adapters, world.source(1), release)
    unloading = await started(adapters.unload(A, 1))
    async with adapters.use(world.source(1)) as new:
        release.set()
        await unloading
        assert new.number != await old
        assert list(world.loaded) == [new.number]
    assert world.pulled == [(A, 1), (A, 1)]


async def test_an_unload_that_is_given_up_still_happens(world, adapters):
    release = asyncio.Event()
    request = await holding(adapters, world.source(1), release)
    unloading = await started(adapters.unload(A, 1))
    unloading.cancel()
    release.set()
    await request
    await adapters.unload(A, 1)
    assert world.loaded == {}


async def test_a_version_unloaded_while_it_is_pulled_goes_as_soon_as_it_has_come(world, adapters):
    world.go.clear()
    asking = await started(adapters.ensure(world.source(1)))
    unloading = await started(adapters.unload(A, None))
    asking.cancel()
    world.go.set()
    await unloading
    assert world.loaded == {}
    assert adapters.live() == ()


async def test_unloading_takes_only_what_is_named(world, adapters):
    for source in (world.source(1), world.source(2), world.source(1, B)):
        await adapters.ensure(source)
    await adapters.unload(A, 1)
    await adapters.unload(A, 7)
    assert [(s.adapter, s.policy_version) for s in adapters.live()] == [(A, 2), (B, 1)]
    await adapters.unload(A, None)
    assert [(s.adapter, s.policy_version) for s in adapters.live()] == [(B, 1)]


async def test_the_least_recently_used_version_makes_room(world, adapters):
    for version in (1, 2, 3):
        await adapters.ensure(world.source(version))
    await adapters.ensure(world.source(1))
    await adapters.ensure(world.source(4))
    await adapters.unload(A, 2)
    assert {source.policy_version for source in adapters.live()} == {1, 3, 4}
    assert len(world.loaded) == 3


async def test_no_version_in_use_makes_room(world, adapters):
    release = asyncio.Event()
    requests = [await holding(adapters, world.source(version), release) for version in (1, 2, 3)]
    with pytest.raises(Overloaded):
        await adapters.ensure(world.source(4))
    release.set()
    await asyncio.gather(*requests)
    await adapters.ensure(world.source(4))


async def test_other_weights_under_the_same_name_are_another_version(world, adapters):
    """An adapter that was deleted and made again begins at version 0 again."""
    release = asyncio.Event()
    old = await holding(adapters, world.source(0, weights=1.0), release)
    async with adapters.use(world.source(0, weights=2.0)) as new:
        weights = (new.folder / "adapter_model.safetensors").read_bytes()
        assert weights == tensors(2.0)
        release.set()
        assert await old != new.number


async def test_no_number_or_name_is_ever_used_twice(world, adapters):
    seen = []
    for version in (1, 2, 1, 2):
        async with adapters.use(world.source(version)) as adapter:
            seen += [adapter.number, adapter.name, adapter.folder]
        await adapters.unload(A, None)
    assert len(set(seen)) == 12


async def test_at_the_end_transfers_are_broken_off(world, tmp_path):
    world.go.clear()
    adapters = Adapters(world, world.pull, tmp_path, base_model="base", max_rank=8, max_versions=3)
    async with adapters:
        asking = await started(adapters.ensure(world.source(1)))
    with pytest.raises(Unavailable):
        await asking


@pytest.mark.parametrize(
    "config", ["", "[]", "{}", '{"r": "x"}', '{"r": 8, "rank_pattern": 3}', '{"r": 9}']
)
async def test_a_bad_adapter_config_is_refused_before_its_tensors_are_sent(world, adapters, config):
    async def pull(source):
        yield AdapterExport(source.adapter, source.policy_version, "base", config, 100)
        pytest.fail("the tensors were asked for")

    adapters._pull = pull
    with pytest.raises(MeshError):
        await adapters.ensure(world.source(1))


@pytest.mark.parametrize("data", [b"", b"x" * 7, b"\xff" * 100, tensors(1.0)[:-1]])
async def test_what_is_no_safetensors_file_is_refused(world, adapters, data):
    source = world.source(1)

    async def pull(source):
        config = json.dumps({"r": 8})
        yield AdapterExport(source.adapter, source.policy_version, "base", config, len(data))
        yield data
        yield source.digest

    adapters._pull = pull
    with pytest.raises(FailedPrecondition):
        await adapters.ensure(source)


async def test_a_chunk_before_the_header_is_refused(world, adapters):
    closed = asyncio.Event()

    async def pull(_):
        with contextlib.ExitStack() as stack:
            stack.callback(closed.set)
            yield b"chunk"

    adapters._pull = pull
    with pytest.raises(FailedPrecondition):
        await adapters.ensure(world.source(1))
    assert closed.is_set()
