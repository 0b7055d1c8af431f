"""A file system with a Python and nothing else, which every run sees, read-only, as its root.

It has the files of the interpreter that runs the service. It is made when the service starts, where
all may read it (the service may run as root, a sandbox never does), and gone when the service ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PYTHON = "/usr/bin/python3"
"""In the sandbox."""
DEVICES = ("/dev/null", "/dev/random", "/dev/urandom", "/dev/zero")
"""Those of the host that there are in the sandbox too."""
_PREFIX = "rollmesh-sandbox-"
# Not needed to run programs, or for packages that are not there, or of no use without a network,
# a terminal or a database.
_LEFT_OUT = shutil.ignore_patterns(
    "site-packages", "dist-packages", "config-*", "test", "tests", "idlelib", "tkinter", "turtle*",
    "ensurepip", "venv", "lib2to3", "distutils", "pydoc_data", "*.opt-?.pyc", "_tkinter*", "_test*",
    "_ssl*", "_hashlib*", "readline*", "_curses*", "_dbm*", "_gdbm*", "nis*",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Runtime:
    """`folder` is readable for all and gone with the service; the tree is in it.

    In the tree `PYTHON` runs in `environment`. /work and DEVICES are empty there.
    """

    folder: Path

    @property
    def root(self) -> Path:
        """Of the tree."""
        return self.folder / "root"

    @property
    def environment(self) -> dict[str, str]:
        """All that a sandboxed program has of it."""
        return {
            # The same program does the same, which with random hashes depends on its sets' order.
            "PYTHONHASHSEED": "0",
            "LD_LIBRARY_PATH": "/usr/lib",
            # Arenas reserve address space, which is bounded, for each thread.
            "MALLOC_ARENA_MAX": "1",
        }


@contextlib.contextmanager
def runtime() -> Iterator[Runtime]:
    """Make the tree, and remove it in the end. Blocks for up to some seconds."""
    _sweep()
    made = Runtime(Path(tempfile.mkdtemp(prefix=_PREFIX)))
    lock = os.open(made.folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made.folder.chmod(0o755)
        _fill(made.root)
        yield made
    finally:
        shutil.rmtree(made.folder, ignore_errors=True)
        os.close(lock)


def _sweep() -> None:
    """Remove what services left that were killed: theirs is not locked any more."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)


def _fill(root: Path) -> None:
    for folder in ("work", "dev", "usr/bin", "usr/lib"):
        (root / folder).mkdir(parents=True)
    for device in DEVICES:
        (root / device[1:]).touch()
    python = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]  # noqa: SLF001
    _take(python, root / PYTHON[1:])
    base = {"installed_base": sys.base_prefix, "platbase": sys.base_prefix}
    for library in {Path(sysconfig.get_path(name, vars=base)) for name in ("stdlib", "platstdlib")}:
        inside = root / "usr" / library.relative_to(sys.base_prefix)
        shutil.copytree(library, inside, ignore=_LEFT_OUT, copy_function=_take, dirs_exist_ok=True)
    for name, source in _shared_libraries(python, [*(root / "usr").rglob("*.so")]):
        # The loader has its place; all others are found by LD_LIBRARY_PATH.
        target = root / name[1:] if name.startswith("/") else root / "usr/lib" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _take(Path(source), target)
    _compile(root / "usr/lib")
    for path in root.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)


def _take(source: str | Path, target: str | Path) -> None:
    """The same file where it can be had, else a copy: readable for all."""
    path = Path(source)
    if stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444:
        with contextlib.suppress(OSError):  # Another file system, or another owner.
            os.link(path.resolve(), target)
            return
    shutil.copy2(path, target)
    Path(target).chmod(0o755)


def _shared_libraries(python: Path, extensions: Sequence[Path]) -> set[tuple[str, str]]:
    """What they are linked with: the name that each is asked for by, and its file."""
    # What ldd does, for all of them at once: the loader says what it loads, and runs nothing.
    said = subprocess.run(  # noqa: S603 - our own interpreter
        [str(python)],
        check=True,
        capture_output=True,
        text=True,
        env={"LD_TRACE_LOADED_OBJECTS": "1", "LD_PRELOAD": " ".join(map(str, extensions))},
    ).stdout
    found = set(re.findall(r"^\s+(\S+) => (/\S+) \(", said, re.MULTILINE))
    loaders = re.findall(r"^\s+(/\S+) \(", said, re.MULTILINE)
    return found | {(name, name) for name in loaders if Path(name) not in extensions}


def _compile(library: Path) -> None:
    """Where the image came without bytecode, every run would make its own."""
    subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-I", "-m", "compileall", "-q", "-q", str(library)], check=False
    )
