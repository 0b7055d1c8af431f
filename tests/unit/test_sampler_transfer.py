"""Pulling a version: whatever goes wrong on the way, what arrives is what was asked for."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from rollmesh.blobs import Blobs
from rollmesh.digest import safetensors_digest
from rollmesh.errors import (
    CapacityExhausted,
    DeadlineExceeded,
    DigestMismatch,
    InternalError,
    InvalidRequest,
    NotFound,
    SourceUnavailable,
    Unavailable,
)
from rollmesh.exports import StoredExport, export_key, write_export
from rollmesh.types import AdapterExport, AdapterSource
from services.sampler.transfer import Sources

A = "projects/p/adapters/a"
KEY = export_key("0123456789abcdef" * 2)
CHUNK = 100


def tensors(seed: int = 0) -> bytes:
    """A safetensors file of 250 numbers."""
    numbers = np.random.default_rng(seed).normal(size=250).astype("<f4").tobytes()
    entry = {"dtype": "F32", "shape": [250], "data_offsets": [0, len(numbers)]}
    header = json.dumps({"w": entry}).encode()
    return len(header).to_bytes(8, "little") + header + numbers


FILE = tensors()
DIGEST = safetensors_digest(FILE)
SOURCE = AdapterSource(A, 3, DIGEST, "trainer:1", KEY)
EXPORT = AdapterExport(A, 3, "base", '{"r": 8}', len(FILE))
MIDDLE = len(FILE) // CHUNK // 2 * CHUNK


async def stall() -> None:
    await asyncio.Event().wait()


async def fail(error: Exception) -> None:
    raise error


SPOILT_TRANSFERS = {
    "other life": {"file": tensors(1), "digest": safetensors_digest(tensors(1))},
    "flipped bit": {"file": FILE[:-1] + bytes([FILE[-1] ^ 1])},
    "other trailer": {"digest": "0" * 64},
    "no safetensors": {"file": bytes(len(FILE))},
    "other version": {"export": replace(EXPORT, policy_version=4)},
    "other adapter": {"export": replace(EXPORT, adapter="projects/p/adapters/b")},
    "other size": {"export": replace(EXPORT, num_bytes=len(FILE) + 1)},
    "long": {"export": replace(EXPORT, num_bytes=len(FILE) - 1)},
    "other header": {"export": replace(EXPORT, adapter_config_json='{"r": 4}')},
    "no header": {"export": b"chunk"},
}
"""What is sent instead."""
BREAKS = {
    "torn before the header": ("header", None),
    "torn in the first chunk": (0, None),
    "torn in the middle": (MIDDLE, None),
    "broken in the middle": (MIDDLE, lambda: fail(Unavailable("connection reset"))),
    "bug in the middle": (MIDDLE, lambda: fail(InternalError("a bug over there"))),
    "late in the middle": (MIDDLE, lambda: fail(DeadlineExceeded("too slow"))),
    "forgotten in the middle": (MIDDLE, lambda: fail(NotFound("kept no longer"))),
    "stalled in the middle": (MIDDLE, stall),
    "torn in the last chunk": (len(FILE) // CHUNK * CHUNK, None),
    "torn before the trailer": ("trailer", None),
    "stalled before the trailer": ("trailer", stall),
}
"""Where a transfer ends, and how; None: as if it were complete."""


class Trainer:
    """Sends the version, and on each call commits the next of `faults`, then none.

    Attributes:
        offsets: of the calls.
        num_bytes: of the file, sent in all calls.
    """

    def __init__(self, faults=()) -> None:
        self.faults = list(faults)
        self.offsets = []
        self.num_bytes = 0

    async def parts(self, source, offset):
        assert source == SOURCE
        self.offsets.append(offset)
        fault = self.faults.pop(0) if self.faults else ""
        if isinstance(fault, Exception):
            raise fault
        if fault == "shorter file" and offset:
            raise InvalidRequest("offset: beyond the file", field="offset")
        break_at, how = BREAKS.get(fault, (None, None))
        for place, part in self.transfer(offset, **SPOILT_TRANSFERS.get(fault, {})):
            if place == break_at:
                if how is None:
                    return
                await how()
            self.num_bytes += len(part) if isinstance(place, int) else 0
            yield part
            if fault == "second header" and place == "header":
                yield part

    def transfer(self, offset, *, file=FILE, digest=DIGEST, export=EXPORT):
        yield "header", export
        for start in range(offset, len(file), CHUNK):
            yield start, file[start : start + CHUNK]
        yield "trailer", digest


def spoilt(blobs: Blobs, folder, state: str) -> Blobs | None:
    """The blob store with the version, in the given `state`."""
    if state == "none":
        return None
    if state == "unavailable":
        (folder / KEY).mkdir(parents=True)
        return blobs
    if state != "missing":
        export = replace(EXPORT, policy_version=4) if state == "other" else EXPORT
        write_export(blobs, KEY, export, DIGEST, FILE)
        path = folder / KEY
        content = path.read_bytes()
        changed = {
            "flipped in the tensors": content[:-1] + bytes([content[-1] ^ 1]),
            "flipped in the config": content.replace(b'\\"r\\": 8', b'\\"r\\": 9'),
            "flipped length": bytes([content[0] ^ 255]) + content[1:],
            "cut": content[:-10],
            "cut in the header": content[:60],
            "empty": b"",
        }.get(state, content)
        assert (changed == content) is (state in {"whole", "other"})
        path.write_bytes(changed)
    return blobs


async def admitted(export: AdapterExport) -> None:
    assert export.adapter == A


async def pulled(trainer: Trainer, blobs: Blobs | None, source=SOURCE, admit=admitted, stall_s=0.0):
    """Stalls are waited for only where there are some: threads are slow on a busy machine."""
    stall_s = stall_s or (0.5 if "stall" in str(trainer.faults) else 60.0)
    sources = Sources(trainer.parts, blobs, stall_s=stall_s, pauses_s=(0, 0, 0, 0))
    return await sources.pull(source, admit)


@pytest.fixture
def blobs_in(tmp_path):
    return lambda state: spoilt(Blobs(str(tmp_path)), tmp_path, state)


RESUMABLE = [fault for fault in BREAKS if fault != "forgotten in the middle"]
OTHERS = [
    "other life",
    "flipped bit",
    "other trailer",
    "no safetensors",
    "other version",
    "other adapter",
    "other size",
    "no header",
    "second header",
    "long",
]
AWAY = Unavailable("connection refused")
GONE = NotFound("not held here")


@pytest.mark.parametrize("fault", RESUMABLE)
async def test_a_transfer_that_breaks_off_goes_on_with_the_rest_alone(fault):
    trainer = Trainer([fault])
    transfer = await pulled(trainer, None)
    assert (transfer.file, transfer.export) == (FILE, EXPORT)
    assert trainer.num_bytes == len(FILE)
    assert len(trainer.offsets) == 2


async def test_a_transfer_that_breaks_off_again_and_again_ends_as_long_as_something_comes():
    """One chunk a call is progress."""

    class Miser(Trainer):
        async def parts(self, source, offset):
            self.offsets.append(offset)
            yield EXPORT
            yield FILE[offset : offset + CHUNK]
            if offset + CHUNK >= len(FILE):
                yield DIGEST

    trainer = Miser()
    assert (await pulled(trainer, None)).file == FILE
    assert trainer.offsets == list(range(0, len(FILE), CHUNK))


@pytest.mark.parametrize("fault", OTHERS)
async def test_what_was_not_asked_for_is_thrown_away_and_had_once_more(fault):
    trainer = Trainer([fault])
    assert (await pulled(trainer, None)).file == FILE
    assert trainer.offsets == [0, 0]


async def test_no_more_is_taken_in_than_there_is_room_for():
    class Endless(Trainer):
        async def parts(self, source, offset):
            yield EXPORT
            while True:
                self.num_bytes += CHUNK
                assert self.num_bytes < 3 * len(FILE)
                yield bytes(CHUNK)

    with pytest.raises(DigestMismatch):
        await pulled(Endless(), None)


@pytest.mark.parametrize("fault", ["other header", "other size", "shorter file", "other life"])
async def test_what_changes_between_two_calls_begins_anew(fault):
    trainer = Trainer(["torn in the middle", fault])
    transfer = await pulled(trainer, None)
    assert (transfer.file, transfer.export) == (FILE, EXPORT)
    assert trainer.offsets == [0, MIDDLE, 0]


@pytest.mark.parametrize(
    "faults",
    [
        [AWAY] * 9,
        [GONE],
        ["stalled in the middle", *[AWAY] * 9],
        ["forgotten in the middle"],
        ["torn before the header"] * 9,
        ["other life"] * 9,
        ["flipped bit"] * 9,
        ["torn in the middle", "other header"],
    ],
    ids=lambda faults: f"{str(faults[0])[:30]}, {len(faults)} times",
)
async def test_while_the_trainer_is_away_or_another_the_blob_has_it(blobs_in, faults):
    trainer = Trainer(faults)
    transfer = await pulled(trainer, blobs_in("whole"))
    assert (transfer.file, transfer.export) == (FILE, EXPORT)
    assert len(trainer.offsets) <= 2


SPOILT = [
    "other",
    "flipped in the tensors",
    "flipped in the config",
    "flipped length",
    "cut",
    "cut in the header",
    "empty",
]


@pytest.mark.parametrize(
    ("faults", "blob", "error", "calls"),
    [
        pytest.param([AWAY] * 9, "none", SourceUnavailable, 4, id="away, no blob"),
        pytest.param([AWAY] * 9, "missing", SourceUnavailable, 4, id="away, blob missing"),
        pytest.param([AWAY] * 9, "unavailable", SourceUnavailable, 4, id="both away"),
        pytest.param([AWAY] * 9, "cut", SourceUnavailable, 4, id="away, blob spoilt"),
        pytest.param([GONE] * 9, "none", NotFound, 1, id="gone, no blob"),
        pytest.param([GONE] * 9, "missing", NotFound, 1, id="gone, blob missing"),
        pytest.param([GONE] * 9, "unavailable", SourceUnavailable, 1, id="gone, blobs away"),
        *(pytest.param([GONE] * 9, state, DigestMismatch, 1, id=state) for state in SPOILT),
        *(pytest.param([fault] * 9, "none", DigestMismatch, 2, id=fault) for fault in OTHERS),
        *(
            pytest.param([fault] * 9, "missing", DigestMismatch, 2, id=f"{fault}, blob missing")
            for fault in OTHERS
        ),
        pytest.param(["flipped bit"] * 9, "cut", DigestMismatch, 2, id="both spoilt"),
        pytest.param(["other life"] * 9, "unavailable", SourceUnavailable, 2, id="blobs away"),
    ],
)
async def test_a_version_that_no_place_brings_is_told_as_what_it_is(
    blobs_in, faults, blob, error, calls
):
    trainer = Trainer(faults)
    with pytest.raises(error) as caught:
        await pulled(trainer, blobs_in(blob))
    assert type(caught.value) is error
    assert A in str(caught.value)
    assert len(trainer.offsets) == calls


@pytest.mark.parametrize("blob", ["missing", *SPOILT])
async def test_a_blob_that_has_it_not_leaves_the_trainer_its_chance(blobs_in, blob):
    trainer = Trainer([AWAY])
    assert (await pulled(trainer, blobs_in(blob))).file == FILE


async def test_a_version_without_a_key_comes_from_its_trainer_alone(blobs_in):
    with pytest.raises(NotFound):
        await pulled(GoneTrainer(), blobs_in("whole"), source=replace(SOURCE, export_key=""))


async def test_a_version_without_a_trainer_comes_from_the_blob_alone(blobs_in):
    trainer = Trainer()
    source = replace(SOURCE, trainer_address="")
    assert (await pulled(trainer, blobs_in("whole"), source=source)).file == FILE
    with pytest.raises(NotFound, match="no blob store"):
        await pulled(trainer, None, source=source)
    assert trainer.offsets == []


class GoneTrainer(Trainer):
    async def parts(self, source, offset):
        raise GONE
        yield


@pytest.mark.parametrize(
    "key",
    [
        "versions/../secrets",
        "/etc/passwd",
        f"snapshots/{'0' * 32}",
        f"versions/{'0' * 31}",
        f"versions/{'0' * 33}",
        f"versions/{'A' * 32}",
        f"versions/{'0' * 32}\n",
        f"x/versions/{'0' * 32}",
    ],
)
async def test_a_key_that_no_trainer_makes_reaches_neither_trainer_nor_store(blobs_in, key):
    trainer = Trainer()
    with pytest.raises(InvalidRequest) as caught:
        await pulled(trainer, blobs_in("whole"), source=replace(SOURCE, export_key=key))
    assert caught.value.context["field"] == "source.export_key"
    assert not trainer.offsets


@pytest.mark.parametrize("error", [CapacityExhausted("too large"), InvalidRequest("other model")])
async def test_what_is_not_admitted_is_not_sent(blobs_in, error):
    async def refuse(_):
        raise error

    trainer = Trainer()
    with pytest.raises(type(error), match=str(error)):
        await pulled(trainer, blobs_in("whole"), admit=refuse)
    assert trainer.num_bytes == 0
    assert trainer.offsets == [0]


async def test_a_transfer_waits_for_room_as_long_as_it_takes():
    """A pause of ours is no stall of theirs."""
    begun, go = asyncio.Event(), asyncio.Event()

    async def wait(_):
        begun.set()
        await go.wait()

    trainer = Trainer()
    pulling = asyncio.create_task(pulled(trainer, None, admit=wait, stall_s=0.5))
    await begun.wait()
    asyncio.get_running_loop().call_later(1.0, go.set)
    assert (await pulling).file == FILE
    assert trainer.offsets == [0]


async def test_a_blob_is_read_in_pieces_of_bounded_size(tmp_path):
    file = FILE[:8] + bytes(9 * 2**20)
    sizes = []

    class Store(Blobs):
        def read(self, key, start=None, end=None):
            content = super().read(key, start, end)
            sizes.append(len(content))
            return content

    blobs = Store(str(tmp_path))
    write_export(blobs, KEY, replace(EXPORT, num_bytes=len(file)), DIGEST, file)
    stored = StoredExport(blobs, KEY)
    assert stored.export.num_bytes == len(file)
    # Its tensors are nonsense, so it is read as a whole and then refused.
    with pytest.raises(DigestMismatch):
        await pulled(GoneTrainer(), blobs)
    assert max(sizes) <= 4 * 2**20


async def test_a_blob_store_that_hangs_holds_up_nothing_else(tmp_path):
    go = threading.Event()
    reads = []

    class Hanging(Blobs):
        def read(self, key, start=None, end=None):
            reads.append(key)
            assert go.wait(30)
            return super().read(key, start, end)

    blobs = Hanging(str(tmp_path))
    write_export(blobs, KEY, EXPORT, DIGEST, FILE)
    try:
        sources = Sources(GoneTrainer().parts, blobs, stall_s=0.02, pauses_s=(0, 0))
        pulls = [sources.pull(SOURCE, admitted) for _ in range(10)]
        results = await asyncio.gather(*pulls, return_exceptions=True)
        assert {type(result) for result in results} == {SourceUnavailable}
        assert (await pulled(Trainer(), None)).file == FILE
    finally:
        go.set()
    patient = Sources(GoneTrainer().parts, blobs, stall_s=30, pauses_s=(0,))
    assert (await patient.pull(SOURCE, admitted)).file == FILE
    # Four hung, and none waits behind them that nobody wants any more.
    assert len(reads) == 4 + 2
