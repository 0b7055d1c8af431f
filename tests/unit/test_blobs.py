"""The blob store: whole blobs, keys that cannot climb out, in a folder and in memory."""

from __future__ import annotations

import os
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from rollmesh.blobs import Blobs
from rollmesh.errors import InvalidRequest, NotFound, Unavailable


@pytest.fixture(params=["folder", "object store"])
def blobs(request, tmp_path):
    if request.param == "folder":
        return Blobs(str(tmp_path / "blobs"))
    return Blobs(f"memory://{uuid.uuid4().hex}")


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_what_was_written_is_read_until_it_is_deleted(blobs):
    blobs.write("ops/a", b"one", b"", b"two")
    assert blobs.read("ops/a") == b"onetwo"
    assert blobs.read("ops/a", 1, 4) == b"net"
    assert blobs.read("ops/a", 4, 99) == b"wo"
    blobs.delete("ops/a")
    blobs.delete("ops/a")
    with pytest.raises(NotFound) as caught:
        blobs.read("ops/a")
    assert caught.value.context["resource"] == "ops/a"


def test_keys_lists_what_lies_under_a_prefix_with_its_time(blobs):
    assert list(blobs.keys("snapshots")) == []
    for key in ("snapshots/1/a", "snapshots/1/b", "snapshots/2/a", "ops/1"):
        blobs.write(key, b"x")
    found = dict(blobs.keys("snapshots"))
    assert found.keys() == {"snapshots/1/a", "snapshots/1/b", "snapshots/2/a"}
    assert min(found.values()) > 1e9
    assert set(dict(blobs.keys("snapshots/1"))) == {"snapshots/1/a", "snapshots/1/b"}
    assert list(blobs.keys("snap")) == []


@pytest.mark.parametrize(
    "key",
    ["", "a", "/etc/passwd", "../a/b", "ops/../../a", "ops/a.b", "ops//a", "ops/a/", "ops/A"],
)
def test_no_key_climbs_out_of_the_store(tmp_path, key):
    blobs = Blobs(str(tmp_path / "blobs"))
    for ask in (blobs.read, blobs.delete, lambda key: blobs.write(key, b"x")):
        with pytest.raises(InvalidRequest) as caught:
            ask(key)
        assert caught.value.context["field"] == "key"
    assert files(tmp_path) == set()


def test_a_url_that_nothing_understands_is_told_at_the_start():
    with pytest.raises(InvalidRequest) as caught:
        Blobs("nonsense://bucket")
    assert caught.value.context["field"] == "blobs"


def test_a_write_that_fails_leaves_nothing_and_keeps_what_was_there(tmp_path, monkeypatch):
    blobs = Blobs(str(tmp_path))
    blobs.write("ops/a", b"before")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for key in ("ops/a", "ops/b"):
        with pytest.raises(Unavailable, match="No space left"):
            blobs.write(key, b"after")
    monkeypatch.undo()
    assert blobs.read("ops/a") == b"before"
    assert files(tmp_path) == {"ops", "ops/a"}


def test_what_a_killed_writer_left_is_no_blob(tmp_path):
    blobs = Blobs(str(tmp_path))
    blobs.write("ops/a", b"x")
    (tmp_path / "ops" / "b.123-456").write_bytes(b"hal")
    assert [key for key, _ in blobs.keys("ops")] == ["ops/a"]


def test_folders_go_with_their_last_blob_whoever_writes_at_the_same_time(tmp_path):
    blobs = Blobs(str(tmp_path))

    def write_and_delete(writer):
        for number in range(100):
            key = f"snapshots/one/{writer}-{number}"
            blobs.write(key, b"x")
            assert blobs.read(key) == b"x"
            blobs.delete(key)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write_and_delete, range(4)))
    assert files(tmp_path) == {"snapshots"}
