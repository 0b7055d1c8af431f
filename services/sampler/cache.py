"""A folder of the sampler's own for pulled adapters, gone when the process is."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

_PREFIX = "rollmesh-sampler-"
_LOCK = "lock"


@contextlib.contextmanager
def cache_folder(parent: Path | None) -> Iterator[Path]:
    """A fresh folder in `parent` (None: in memory where possible), removed at the end.

    A sampler that was killed could not remove its own: the lock that it held is free then, and the
    next sampler that starts removes the folder.
    """
    memory = Path("/dev/shm")  # noqa: S108 - the folder in it is private
    parent = parent or (memory if memory.is_dir() else Path(tempfile.gettempdir()))
    _remove_orphans(parent)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    with (folder / f"new-{_LOCK}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Only now can others see it: it is never there without being held.
        (folder / f"new-{_LOCK}").rename(folder / _LOCK)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_orphans(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        # Without a lock file it is being made or removed at this moment.
        with contextlib.suppress(OSError), (folder / _LOCK).open() as lock:
            if _is_free(lock):
                log.info("removing %s, which a sampler that was killed left behind", folder)
                shutil.rmtree(folder, ignore_errors=True)


def _is_free(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
