"""Signs of life of vLLM's processes, in small files of a folder that they share.

A thread writes the time several times a second. A long forward pass does not stop it; a stopped
process does, and so does one that hangs with Python's lock held.
"""

from __future__ import annotations

import mmap
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BEAT_S = 0.1
_TIME = struct.Struct("d")


@dataclass(frozen=True)
class Whereabouts:
    """What vLLM's processes are told, as its `additional_config`: the folder that they write to."""

    folder: str

    def compute_hash(self) -> str:
        """Nothing that vLLM compiles depends on it."""
        return ""


def shared_folder(vllm_config: Any) -> Path:
    """The folder, in a process of vLLM's."""
    return Path(vllm_config.additional_config.folder)


def show_life(folder: Path, name: str) -> None:
    """Begin to write the time (of `time.monotonic`) to `folder`, until the process ends."""
    path = folder / f"life-{name}"
    path.write_bytes(_TIME.pack(time.monotonic()))
    with path.open("r+b") as file:
        page = mmap.mmap(file.fileno(), _TIME.size)
    threading.Thread(target=_beat, args=(page,), daemon=True, name="life").start()


def _beat(page: mmap.mmap) -> None:
    while True:
        _TIME.pack_into(page, 0, time.monotonic())
        time.sleep(_BEAT_S)


class Watch:
    """The signs of life of all processes that show any in `folder` by now."""

    def __init__(self, folder: Path) -> None:
        self._pages = []
        for path in sorted(folder.glob("life-*")):
            with path.open("rb") as file:
                self._pages.append(mmap.mmap(file.fileno(), _TIME.size, access=mmap.ACCESS_READ))

    def silent_s(self) -> float:
        """Age of the oldest of the last signs."""
        last: float = min(_TIME.unpack_from(page)[0] for page in self._pages)
        return max(0.0, time.monotonic() - last)


def report(folder: Path, name: str, reason: str) -> None:
    """Leave word of why this process ends."""
    (folder / f"report-{name}").write_text(reason)


def reported(folder: Path) -> str:
    """What the processes left word of; empty: nothing."""
    return "; ".join(path.read_text() for path in sorted(folder.glob("report-*")))
