"""Kills what a mesh has started, should the mesh's own process be killed before it could.

Standard input brings `+SESSION` when a session of processes begins and `-SESSION` when it has
ended; only the mesh, and its children that have not begun yet, hold the other end. When the input
ends, every session left is killed. Runs as a script too, with nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path


def kill_session(session: int) -> None:
    """Kill every process of `session`, whichever process group it has moved to."""
    killed: set[int] = set()
    # Again, for those that one of them has started meanwhile.
    while found := set(members(session)) - killed:
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        killed |= found


def members(session: int) -> list[int]:
    """The processes of `session`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # PID (NAME) STATE PARENT GROUP SESSION …; a name may hold spaces and brackets.
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                found.append(int(stat.parent.name))
    return found


def main() -> None:
    """Keep the books until the input ends, then kill."""
    sessions: set[int] = set()
    for line in sys.stdin:
        change = sessions.add if line.startswith("+") else sessions.discard
        change(int(line[1:]))
    for session in sessions:
        kill_session(session)


if __name__ == "__main__":
    main()
