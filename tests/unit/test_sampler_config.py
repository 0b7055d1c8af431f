"""The sampler's configuration, and the folder that it keeps adapters in."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from typing import TYPE_CHECKING

import pytest

from rollmesh.errors import InvalidRequest
from services.sampler.cache import cache_folder
from services.sampler.config import SamplerConfig

if TYPE_CHECKING:
    from pathlib import Path

MODEL = {"base_model": {"name": "m", "path": "/m"}}


@pytest.mark.parametrize(
    ("given", "num_bytes"),
    [(1048576, 2**20), ("512MiB", 2**29), ("4GiB", 2**32), ("1.5 GiB", 3 * 2**29), ("7", 7)],
)
def test_memory_is_given_in_bytes_or_with_a_unit(given, num_bytes):
    config = SamplerConfig.parse({**MODEL, "kv_cache_memory": given}, source="test")
    assert config.kv_cache_memory == num_bytes


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kv_cache_memory", "4GB"),
        ("kv_cache_memory", 0),
        ("kv_cache_memory", "-1GiB"),
        ("backend", "sglang"),
        ("max_rank", 0),
        ("max_rank", 513),
        ("chunk_tokens", 0),
        ("max_cpu_loras", 7),
        ("max_loras", 0),
        ("kv_overcommit", 0.9),
        ("quantum_s", 0),
        ("max_queued", 0),
        ("max_cache", "2GB"),
        ("base_model", {"name": "", "path": "/m"}),
    ],
)
def test_a_bad_value_is_refused_by_its_key(key, value):
    with pytest.raises(InvalidRequest, match=key):
        SamplerConfig.parse({**MODEL, key: value}, source="test")


def test_the_cache_is_a_private_folder_that_is_gone_afterwards(tmp_path):
    with cache_folder(tmp_path, 1) as folder:
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "1").mkdir()
        (folder / "1" / "adapter_model.safetensors").write_bytes(b"x")
    assert not list(tmp_path.iterdir())


def _hold(parent: Path, ready) -> None:
    with cache_folder(parent, 1) as folder:
        (folder / "1").mkdir()
        ready.send(folder)
        signal.pause()


def test_what_a_killed_sampler_left_is_removed_by_the_next_and_what_another_uses_is_not(tmp_path):
    context = multiprocessing.get_context("spawn")
    folders, processes = [], []
    for _ in range(2):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_hold, args=(tmp_path, sender))
        process.start()
        processes.append(process)
        folders.append(receiver.recv())
    os.kill(processes[0].pid, signal.SIGKILL)
    processes[0].join()
    try:
        with cache_folder(tmp_path, 1) as own:
            assert set(tmp_path.iterdir()) == {folders[1], own}
    finally:
        processes[1].kill()
        processes[1].join()


@pytest.mark.parametrize(
    ("max_bytes", "is_there"), [(1, True), (1, False), (2**62, True)], ids=["fits", "none", "small"]
)
def test_the_cache_is_in_memory_where_it_fits_and_else_it_is_told(
    tmp_path, monkeypatch, caplog, max_bytes, is_there
):
    memory, temporary = tmp_path / "memory", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    if is_there:
        memory.mkdir()
    fits = is_there and max_bytes == 1
    with cache_folder(None, max_bytes, memory=memory) as folder:
        assert folder.parent == (memory if fits else temporary)
    assert ("max_cache" in caplog.text) is (max_bytes > 1)
