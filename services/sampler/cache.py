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

_MEMORY = Path("/dev/shm")  # noqa: S108 - the folder in it is private
_PREFIX = "rollmesh-sampler-"
_LOCK = "lock"
_SLACK_BYTES = 64 * 2**20
"""Room in memory that is left to others, as engines use it too."""


@contextlib.contextmanager
def cache_folder(parent: Path | None, max_bytes: int, *, memory: Path = _MEMORY) -> Iterator[Path]:
    """A fresh folder in `parent`, removed at the end.

    None: in `memory` where so many bytes fit, else in the temporary folder.

    A sampler that was killed could not remove its own: the lock that it held is free then, and the
    next sampler that starts removes the folder.
    """
    for place in {parent} if parent else {memory, Path(tempfile.gettempdir())}:
        _remove_orphans(place)
    parent = parent or _default(memory, max_bytes)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    with (folder / f"new-{_LOCK}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Only now can others see it: it is never there without being held.
        (folder / f"new-{_LOCK}").rename(folder / _LOCK)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _default(memory: Path, max_bytes: int) -> Path:
    temporary = Path(tempfile.gettempdir())
    if not memory.is_dir():
        return temporary
    free = shutil.disk_usage(memory).free
    if free >= max_bytes + _SLACK_BYTES:
        return memory
    log.warning(
        "%s has %d bytes free, max_cache is %d: adapters are kept in %s, which is slower; make one "
        "larger or the other smaller",
        memory,
        free,
        max_bytes,
        temporary,
    )
    return temporary


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
