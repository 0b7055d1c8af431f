"""Signs of life of vLLM's processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.sampler.backends.vllm_life import (
    Watch,
    Whereabouts,
    report,
    reported,
    shared_folder,
    show_life,
)

ROOT = Path(__file__).parents[2]
SHOW = """
import sys, time
from pathlib import Path
from services.sampler.backends.vllm_life import show_life
show_life(Path(sys.argv[1]), "other")
print("shows", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that shows life."""
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", SHOW, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"shows\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def until(holds) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_process_that_is_silent_longest_counts(tmp_path, other):
    show_life(tmp_path, "this")
    watch = Watch(tmp_path)
    until(lambda: watch.silent_s() < 0.5)
    os.kill(other.pid, signal.SIGSTOP)
    until(lambda: watch.silent_s() > 1)
    os.kill(other.pid, signal.SIGCONT)
    until(lambda: watch.silent_s() < 0.5)


def test_last_words_are_found(tmp_path):
    assert not reported(tmp_path)
    report(tmp_path, "worker-1", "wrong slot")
    report(tmp_path, "worker-0", "wrong block")
    assert reported(tmp_path) == "wrong block; wrong slot"


def test_the_folder_does_not_change_what_vllm_compiles(tmp_path):
    places = [Whereabouts(str(tmp_path)), Whereabouts("/other")]
    assert len({place.compute_hash() for place in places}) == 1
    assert shared_folder(SimpleNamespace(additional_config=places[0])) == tmp_path
