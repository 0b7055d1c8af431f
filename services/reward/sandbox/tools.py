"""The programs that make sandboxes, and how each is told to make ours.

Both get new user, PID, network, mount, IPC, UTS and cgroup namespaces, an unprivileged user
without capabilities who can gain none, no environment but Runtime's, the runtime as its root,
read-only, and one bounded folder to write in; both end with the service, and so does all in them.
Neither leaves the group of processes that it is started in, so that who ends this misses nothing,
however far the sandbox has come; the program itself leaves it, in stage.py.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from services.reward.sandbox.installed import as_user, found
from services.reward.sandbox.runtime import DEVICES, PYTHON
from services.reward.sandbox.seccomp import bpf, kafel

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from services.reward.sandbox.limits import Limits
    from services.reward.sandbox.runtime import Runtime

USER = "65534"
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
        self, user: int | None, limits: Limits, control: int, python: Sequence[str]
    ) -> contextlib.AbstractContextManager[Command]:
        """What to start so that PYTHON with the arguments `python` runs in a sandbox.

        `user` is who makes it, by number; None: whoever the service is. `control` is the number of
        a file that it is to inherit.
        """
        ...


class Bubblewrap:
    """bubblewrap, behind `unshare` and `mount`.

    bubblewrap cannot bound how many files a tmpfs has, and inodes are memory of the kernel's. So
    the folder is mounted before, in a user namespace around the sandbox's.
    """

    name = "bubblewrap"
    _mounting = '"$1" -n -t tmpfs -o "$2" none "$3" && shift 3 && exec "$@"'

    def __init__(self, runtime: Runtime) -> None:
        self._bwrap, self._unshare, self._mount, self._shell = (
            found(program, self.name, runtime) for program in ("bwrap", "unshare", "mount", "sh")
        )
        self._setpriv = found("setpriv", self.name, runtime)
        self._runtime = runtime
        self._filter = bpf()

    @contextlib.contextmanager
    def command(
        self, user: int | None, limits: Limits, control: int, python: Sequence[str]
    ) -> Iterator[Command]:
        """As Tool says."""
        root, work = str(self._runtime.root), f"{self._runtime.root}/work"
        with _file(self._filter) as seccomp:
            # fmt: off
            arguments = [
                *as_user(self._setpriv, user),
                self._unshare, "--user", "--map-root-user", "--mount", "--",
                self._shell, "-c", self._mounting, "sh", self._mount, _of_folder(limits), work,
                self._bwrap, "--unshare-all", "--unshare-user", "--uid", USER, "--gid", USER,
                "--cap-drop", "ALL", "--die-with-parent", "--hostname", "sandbox",
                "--clearenv", *_each("--setenv", self._runtime.environment.items()),
                "--ro-bind", root, "/", "--bind", work, "/work",
                *_each("--dev-bind", ((path, path) for path in DEVICES)),
                "--chdir", "/work", "--seccomp", str(seccomp), "--", PYTHON, *python,
            ]
            # fmt: on
            yield Command(arguments, (control, seccomp))


class Nsjail:
    """nsjail. Its own limits are left alone: those of stage.py hold for every tool."""

    name = "nsjail"

    def __init__(self, runtime: Runtime) -> None:
        self._nsjail, self._setpriv = (
            found(program, self.name, runtime) for program in ("nsjail", "setpriv")
        )
        self._runtime = runtime
        self._filter = kafel()

    @contextlib.contextmanager
    def command(
        self, user: int | None, limits: Limits, control: int, python: Sequence[str]
    ) -> Iterator[Command]:
        """As Tool says."""
        environment = (("=".join(pair),) for pair in self._runtime.environment.items())
        # fmt: off
        arguments = [
            *as_user(self._setpriv, user), self._nsjail, "--mode", "o", "--quiet",
            "--skip_setsid",
            "--user", USER, "--group", USER, "--disable_rlimits", "--hostname", "sandbox",
            "--time_limit", str(round(limits.wall_s) + 1), *_each("--env", environment),
            "--chroot", str(self._runtime.root), "--disable_proc",
            "--mount", f"none:/work:tmpfs:{_of_folder(limits)}",
            *_each("--bindmount", ((path,) for path in DEVICES)),
            "--iface_no_lo", "--cwd", "/work", "--seccomp_string", self._filter,
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
