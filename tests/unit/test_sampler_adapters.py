"""The versions that are here: what is pulled, kept and removed, when, and within which bounds."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import random
import struct
import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from rollmesh.digest import safetensors_digest
from rollmesh.errors import (
    CapacityExhausted,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    MeshError,
    SourceUnavailable,
    Unavailable,
)
from rollmesh.types import AdapterExport, AdapterSource
from services.sampler.adapters import Adapters
from services.sampler.download import Transfer

if TYPE_CHECKING:
    from pathlib import Path

A = "projects/p/adapters/a"
B = "projects/p/adapters/b"
FILE = "adapter_model.safetensors"


def tensors(value: float, size: int = 1) -> bytes:
    """A safetensors file of `size` equal numbers."""
    entry = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
    header = json.dumps({"w": entry}).encode()
    return len(header).to_bytes(8, "little") + header + struct.pack("<f", value) * size


SIZE = len(tensors(1.0))


class World:
    """A trainer with any version of any adapter, and an engine; both do as they are told.

    Attributes:
        go: transfers end only while it is set.
        pulled: the versions that were asked for, in order.
        under_way: bytes of the transfers that were admitted and are not over.
        released: numbers of the versions that the engine was told to free.
        error: what the next transfer raises in the middle, or the next release.
        config: adapter_config.json of every version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.go = asyncio.Event()
        self.go.set()
        self.pulled: list[tuple[str, int]] = []
        self.under_way = 0
        self.released: list[int] = []
        self.error: Exception | None = None
        self.release_error: Exception | None = None
        self.config = json.dumps({"r": 8})
        self.base_model = "base"
        self.files = {}

    def source(self, version: int, adapter: str = A, weights: float | None = None, size: int = 1):
        file = tensors(float(version) if weights is None else weights, size)
        key = f"versions/{version:032x}"
        source = AdapterSource(adapter, version, safetensors_digest(file), "trainer:1", key)
        self.files[source] = file
        return source

    async def pull(self, source, admit):
        self.pulled.append((source.adapter, source.policy_version))
        file = self.files[source]
        export = AdapterExport(
            source.adapter, source.policy_version, self.base_model, self.config, len(file)
        )
        await admit(export)
        self.under_way += len(file)
        try:
            await self.go.wait()
            if self.error is not None:
                error, self.error = self.error, None
                raise error
            return Transfer(export, bytearray(file))
        finally:
            self.under_way -= len(file)

    async def release(self, adapter) -> None:
        assert (adapter.folder / FILE).exists()
        self.released.append(adapter.number)
        if self.release_error is not None:
            raise self.release_error

    def on_disk(self) -> dict[int, int]:
        """Bytes of each version, by number; one may go while we look."""
        found = {}
        for folder in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found[int(folder.name)] = (folder / FILE).stat().st_size
        return found


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def make(world, **changes) -> Adapters:
    bounds = {"base_model": "base", "max_rank": 8, "max_versions": 3, "max_bytes": 2**20}
    return Adapters(world.pull, world.folder, release=world.release, **{**bounds, **changes})


@pytest.fixture
async def adapters(world):
    async with make(world) as opened:
        yield opened


async def settled() -> None:
    """Let everything that can run without a thread do so."""
    for _ in range(50):
        await asyncio.sleep(0)


async def started(coroutine) -> asyncio.Task:
    task = asyncio.ensure_future(coroutine)
    await settled()
    return task


def versions(adapters) -> list[int]:
    return [source.policy_version for source, _ in adapters.here()]


class Held:
    """A request that holds `source` from when `begin` returns until `end`."""

    def __init__(self, adapters, source) -> None:
        self._holding = adapters.hold(source)
        self.adapter = None

    async def begin(self):
        self.adapter = await self._holding.__aenter__()
        return self

    async def end(self) -> None:
        await self._holding.__aexit__(None, None, None)


async def test_a_version_is_pulled_once_however_many_ask(world, adapters):
    world.go.clear()
    source = world.source(1)
    asking = [asyncio.ensure_future(adapters.pull(source)) for _ in range(25)]
    holding = [asyncio.ensure_future(Held(adapters, source).begin()) for _ in range(25)]
    await settled()
    assert adapters.here() == ()
    world.go.set()
    assert all(seconds > 0 for seconds in await asyncio.gather(*asking))
    held = await asyncio.gather(*holding)
    assert len({each.adapter for each in held}) == 1
    assert world.pulled == [(A, 1)]
    assert await adapters.pull(source) == 0.0
    [(here, adapter)] = adapters.here()
    assert here == replace(source, trainer_address="", export_key="")
    assert adapter == held[0].adapter
    assert adapter.digest == source.digest
    assert (adapter.folder / FILE).read_bytes() == world.files[source]
    assert (adapter.folder / "adapter_config.json").read_text() == world.config
    for each in held:
        await each.end()


async def test_a_caller_that_gives_up_does_not_spoil_it_for_the_others(world, adapters):
    world.go.clear()
    first = await started(adapters.pull(world.source(1)))
    second = await started(adapters.pull(world.source(1)))
    first.cancel()
    world.go.set()
    await second
    assert world.pulled == [(A, 1)]
    assert first.cancelled()


async def test_what_nobody_waits_for_any_more_is_kept(world, adapters):
    world.go.clear()
    only = await started(adapters.pull(world.source(1)))
    only.cancel()
    await settled()
    world.go.set()
    await adapters.pull(world.source(1))
    assert world.pulled == [(A, 1)]


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (SourceUnavailable("both are away"), SourceUnavailable),
        (FailedPrecondition("other weights"), FailedPrecondition),
        (RuntimeError("a bug"), InternalError),
    ],
)
async def test_a_failed_pull_is_told_to_all_who_wait_and_then_forgotten(
    world, adapters, raised, told
):
    world.error = raised
    world.go.clear()
    asking = [await started(adapters.pull(world.source(1))) for _ in range(3)]
    world.go.set()
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(result) for result in results] == [told] * 3
    assert len({id(result) for result in results}) == 3, "each has a traceback of its own"
    assert len({str(result) for result in results}) == 1
    await adapters.unload(A, None)
    assert not world.on_disk()
    assert not world.released
    await adapters.pull(world.source(1))
    assert versions(adapters) == [1]


@pytest.mark.parametrize(
    "config", ["", "[]", "{}", '{"r": "x"}', '{"r": 8, "rank_pattern": 3}', '{"r": 9}']
)
async def test_a_bad_adapter_config_is_refused_before_its_tensors_are_sent(world, adapters, config):
    world.config = config
    world.go.clear()
    with pytest.raises(MeshError):
        await adapters.pull(world.source(1))


async def test_an_adapter_of_another_base_model_is_refused_before_its_tensors_are_sent(
    world, adapters
):
    world.base_model = "other"
    world.go.clear()
    with pytest.raises(InvalidRequest, match="'other'") as caught:
        await adapters.pull(world.source(1))
    assert caught.value.context["allowed"] == "base"


async def test_a_full_disk_is_told_and_survived(world, tmp_path):
    world.folder = tmp_path / "cache"
    async with make(world) as adapters:
        with pytest.raises(CapacityExhausted, match="cache_dir"):
            await adapters.pull(world.source(1))
        world.folder.mkdir()
        await adapters.pull(world.source(1))


# --- leaving -------------------------------------------------------------------------------------


async def test_unloading_waits_until_nobody_holds_it(world, adapters):
    held = await Held(adapters, world.source(1)).begin()
    unloading = await started(adapters.unload(A, 1))
    assert not unloading.done()
    assert world.on_disk() == {held.adapter.number: SIZE}
    assert not world.released
    assert adapters.here() == ()
    await held.end()
    await unloading
    assert world.released == [held.adapter.number]
    assert not list(world.folder.iterdir())


async def test_a_request_that_comes_while_it_is_unloaded_pulls_it_anew(world, adapters):
    old = await Held(adapters, world.source(1)).begin()
    unloading = await started(adapters.unload(A, 1))
    new = await Held(adapters, world.source(1)).begin()
    await old.end()
    await unloading
    assert new.adapter.number != old.adapter.number
    assert list(world.on_disk()) == [new.adapter.number]
    await new.end()
    assert world.pulled == [(A, 1), (A, 1)]


async def test_an_unload_that_is_given_up_still_happens(world, adapters):
    held = await Held(adapters, world.source(1)).begin()
    unloading = await started(adapters.unload(A, 1))
    unloading.cancel()
    await held.end()
    await adapters.unload(A, 1)
    assert not world.on_disk()


async def test_a_version_unloaded_while_it_is_pulled_goes_as_soon_as_it_has_come(world, adapters):
    world.go.clear()
    asking = await started(adapters.pull(world.source(1)))
    unloading = await started(adapters.unload(A, None))
    asking.cancel()
    world.go.set()
    await unloading
    assert not world.on_disk()
    assert adapters.here() == ()


async def test_unloading_takes_only_what_is_named(world, adapters):
    for source in (world.source(1), world.source(2), world.source(1, B)):
        await adapters.pull(source)
    await adapters.unload(A, 1)
    await adapters.unload(A, 7)
    assert [(s.adapter, s.policy_version) for s, _ in adapters.here()] == [(A, 2), (B, 1)]
    await adapters.unload(A, None)
    assert [(s.adapter, s.policy_version) for s, _ in adapters.here()] == [(B, 1)]


async def test_files_stay_until_the_engine_has_let_go_of_them_even_when_it_is_dead(world, adapters):
    world.release_error = Unavailable("the engine is dead")
    await adapters.pull(world.source(1))
    await adapters.unload(A, 1)  # World.release sees that the files are there.
    assert len(world.released) == 1
    assert not world.on_disk()


async def test_a_discarded_copy_goes_when_nobody_holds_it_and_the_next_request_has_another(
    world, adapters
):
    source, other = world.source(0, weights=1.0), world.source(0, weights=2.0)
    await adapters.pull(other)
    old = await Held(adapters, source).begin()
    assert adapters.is_here(source)
    adapters.discard(old.adapter)
    assert not adapters.is_here(source)
    assert adapters.is_here(other), "other weights under the same name stay"
    new = await Held(adapters, source).begin()
    assert new.adapter.number != old.adapter.number
    adapters.discard(old.adapter)
    assert adapters.is_here(source), "the new copy is not the discarded one"
    assert (old.adapter.folder / FILE).exists()
    await old.end()
    await settled()
    assert world.released == [old.adapter.number]
    assert adapters.is_here(source)
    await new.end()


async def test_a_version_on_its_way_is_not_here(world, adapters):
    world.go.clear()
    asking = await started(adapters.pull(world.source(1)))
    assert not adapters.is_here(world.source(1))
    world.go.set()
    await asking
    assert adapters.is_here(world.source(1))


# --- bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [{"max_versions": 3}, {"max_bytes": 3 * SIZE}], ids=str)
async def test_the_least_recently_used_version_makes_room(world, bounds):
    async with make(world, **{"max_versions": 99, **bounds}) as adapters:
        for version in (1, 2, 3, 1, 4):
            await adapters.pull(world.source(version))
        assert versions(adapters) == [3, 1, 4]
        async with adapters.hold(world.source(3)):
            await adapters.pull(world.source(1))
        # That version 3 was held until now is use too.
        await adapters.pull(world.source(5))
        assert versions(adapters) == [1, 3, 5]
        assert len(world.on_disk()) == 3


@pytest.mark.parametrize("bounds", [{"max_versions": 3}, {"max_bytes": 3 * SIZE}], ids=str)
async def test_what_is_held_never_makes_room_and_a_new_version_waits_for_it(world, bounds):
    async with make(world, **{"max_versions": 99, **bounds}) as adapters:
        held = [await Held(adapters, world.source(version)).begin() for version in (1, 2, 3)]
        waiting = [await started(adapters.pull(world.source(version))) for version in (4, 5)]
        assert not any(each.done() for each in waiting)
        assert versions(adapters) == [1, 2, 3]
        await held[1].end()
        await waiting[0]  # first come, first served, and one after the other fits
        await waiting[1]
        assert set(versions(adapters)) == {1, 3, 5}
        for each in (held[0], held[2]):
            assert (each.adapter.folder / FILE).exists()
            await each.end()


async def test_a_version_that_nobody_wants_any_more_gives_up_its_place_in_the_line(world):
    async with make(world, max_versions=1) as adapters:
        held = await Held(adapters, world.source(1)).begin()
        waiting = [await started(adapters.pull(world.source(version))) for version in (2, 3)]
        waiting[0].cancel()
        await settled()
        await held.end()
        await waiting[1]
        assert world.pulled == [(A, 1), (A, 3)]


async def test_a_version_that_waits_for_bytes_gives_up_too(world):
    async with make(world, max_bytes=SIZE) as adapters:
        held = await Held(adapters, world.source(1)).begin()
        waiting = [await started(adapters.pull(world.source(version))) for version in (2, 3)]
        waiting[0].cancel()
        await settled()
        assert world.under_way == 0
        await held.end()
        await waiting[1]
        assert versions(adapters) == [3]


async def test_a_version_that_alone_is_too_large_is_refused_with_both_sizes(world):
    async with make(world, max_bytes=SIZE) as adapters:
        await adapters.pull(world.source(1))
        with pytest.raises(CapacityExhausted) as caught:
            await adapters.pull(world.source(2, size=100))
        assert caught.value.context["value"] == str(len(tensors(2.0, 100)))
        assert caught.value.context["allowed"] == str(SIZE)
        assert versions(adapters) == [1]


class Load:
    """Requests that hold versions, unloads and pulls that fail or are given up, all at random.

    Attributes:
        most_files, most_bytes: that were ever here or under way.
    """

    def __init__(self, world, rng: random.Random) -> None:
        self.world = world
        self.rng = rng
        self.adapters = None
        self.most_files = self.most_bytes = 0
        self.sources = [
            world.source(n, rng.choice([A, B]), size=rng.choice([1, 5, 40, 90])) for n in range(12)
        ]

    def look(self) -> None:
        on_disk = self.world.on_disk()
        self.most_files = max(self.most_files, len(on_disk))
        self.most_bytes = max(self.most_bytes, sum(on_disk.values()) + self.world.under_way)

    async def ask(self) -> None:
        source = self.rng.choice(self.sources)
        if self.rng.random() < 0.1:
            self.world.error = SourceUnavailable("away")
        with contextlib.suppress(SourceUnavailable):
            async with self.adapters.hold(source) as adapter:
                for _ in range(self.rng.randrange(6)):
                    await asyncio.sleep(0)
                    self.look()
                    assert (adapter.folder / FILE).read_bytes() == self.world.files[source]

    async def disturb(self, asking) -> None:
        for task in asking:
            await asyncio.sleep(0)
            self.look()
            self.world.go.set()
            match self.rng.randrange(8):
                case 0:
                    task.cancel()
                case 1:
                    self.world.go.clear()
                case 2:
                    await self.adapters.unload(
                        self.rng.choice([A, B]), self.rng.choice([None, 1, 2, 3])
                    )
        self.world.go.set()


@pytest.mark.parametrize("seed", range(8))
async def test_under_any_load_the_bounds_hold_and_everybody_gets_what_they_asked_for(world, seed):
    rng = random.Random(seed)
    load = Load(world, rng)
    max_versions, max_bytes = [(1, 2**20), (4, 2000), (5, 600), (99, 900)][seed % 4]
    async with make(world, max_versions=max_versions, max_bytes=max_bytes) as adapters:
        load.adapters = adapters
        for _ in range(6):
            asking = [asyncio.ensure_future(load.ask()) for _ in range(40)]
            await load.disturb(asking)
            results = await asyncio.gather(*asking, return_exceptions=True)
            assert {type(result) for result in results} <= {type(None), asyncio.CancelledError}
        load.look()
        for adapter in (A, B):
            await adapters.unload(adapter, None)
    assert 0 < load.most_files <= max_versions
    assert 0 < load.most_bytes <= max_bytes
    assert not world.on_disk()


def traced_bytes() -> int:
    """What Python holds, without the spans that another test's exporter may be collecting."""
    of_spans = [
        tracemalloc.Filter(inclusive=False, filename_pattern=pattern)
        for pattern in ("*/opentelemetry/*", "*/rollmesh/telemetry.py", "*/contextlib.py")
    ]
    snapshot = tracemalloc.take_snapshot().filter_traces(of_spans)
    return sum(trace.size for trace in snapshot.traces)


async def test_a_thousand_versions_go_through_a_cache_of_eight(world, caplog):
    caplog.set_level(logging.ERROR)  # what is logged is kept, and would count
    async with make(world, max_versions=8) as adapters:

        async def publish(numbers) -> None:
            for number in numbers:
                source = world.source(number, size=64)
                await adapters.pull(source)
                assert len(world.on_disk()) <= 8
                del world.files[source]
            world.pulled.clear()
            world.released.clear()

        await publish(range(100))
        tracemalloc.start()
        try:
            gc.collect()
            before = traced_bytes()
            await publish(range(100, 1000))
            gc.collect()
            grown = traced_bytes() - before
        finally:
            tracemalloc.stop()
        assert versions(adapters) == list(range(992, 1000))
        # Less than the smallest thing that could be kept of each.
        assert grown < 200 * 900, grown


# --- identity ------------------------------------------------------------------------------------


async def test_other_weights_under_the_same_name_are_another_version(world, adapters):
    """An adapter that was deleted and made again begins at version 0 again."""
    old = await Held(adapters, world.source(0, weights=1.0)).begin()
    async with adapters.hold(world.source(0, weights=2.0)) as new:
        assert (new.folder / FILE).read_bytes() == tensors(2.0)
        assert (old.adapter.folder / FILE).read_bytes() == tensors(1.0)
        assert new.digest != old.adapter.digest
    await old.end()


async def test_no_number_or_name_is_ever_used_twice(world, adapters):
    seen = []
    for version in (1, 2, 1, 2):
        async with adapters.hold(world.source(version)) as adapter:
            seen += [adapter.number, adapter.name, adapter.folder]
        await adapters.unload(A, None)
    assert len(set(seen)) == 12


async def test_at_the_end_transfers_are_broken_off(world):
    world.go.clear()
    async with make(world) as adapters:
        asking = await started(adapters.pull(world.source(1)))
    with pytest.raises(Unavailable):
        await asking
