"""What a run may use, and what came of it."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

Status: TypeAlias = Literal["exited", "signal", "time", "memory", "output"]
"""How a run ended: by itself, by a signal, or over a limit."""

OUT_OF_MEMORY = 121
"""Exit status by which stage.py says so."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may use.

    A sandboxed program is one process, so bounds of a process are bounds of the run.

    Attributes:
        cpu_s: processor time, rounded up to whole seconds.
        memory_bytes: address space.
        output_bytes: of standard output and of standard error, each.
        file_bytes: its folder, /work, in all.
        num_files: files and folders there.
        num_open: files open at once.
        num_threads: threads at once.
        idle_s: beyond cpu_s, wall time that it may spend waiting, or being kept waiting.
    """

    cpu_s: float = 5.0
    memory_bytes: int = 256 << 20
    output_bytes: int = 1 << 20
    file_bytes: int = 16 << 20
    num_files: int = 256
    num_open: int = 64
    num_threads: int = 16
    idle_s: float = 10.0

    @property
    def wall_s(self) -> float:
        """Seconds after which it is killed, whatever it did with them."""
        return math.ceil(self.cpu_s) + self.idle_s

    def of_process(self) -> Mapping[str, int]:
        """As limits for setrlimit, by the names of the module `resource`."""
        return {
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_CORE": 0,
            "RLIMIT_CPU": math.ceil(self.cpu_s),
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
            "RLIMIT_NOFILE": self.num_open,
            # Of its user in its user namespace: itself and the namespace's first process, too.
            "RLIMIT_NPROC": self.num_threads + 2,
            "RLIMIT_SIGPENDING": 64,
        }


@dataclass(frozen=True, slots=True)
class Program:
    """Python to run: `files` by their names in /work, `argv` from the main file on."""

    files: Mapping[str, bytes]
    argv: tuple[str, ...] = ("main.py",)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run.

    Attributes:
        status: how it ended.
        code: exit status, or number of the signal; with "time", "memory" and "output" of no use.
        stdout: what it wrote, as far as its limit.
        stderr: the same of standard error.
        seconds: wall time from the start of the sandbox on.
    """

    status: Status
    code: int
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def is_well(self) -> bool:
        """Whether it ended by itself, with exit status 0."""
        return self.status == "exited" and self.code == 0

    def __str__(self) -> str:
        """For a person to read."""
        match self.status:
            case "exited":
                return f"exit status {self.code}"
            case "signal":
                return f"ended by {_name(self.code)}"
            case "time":
                return "out of time"
            case "memory":
                return "out of memory"
            case "output":
                return "too much output"


def ended(code: int, seconds: float, limits: Limits) -> tuple[Status, int]:
    """How a program ended, by the exit status of its sandbox: 128 and more are signals."""
    if code == OUT_OF_MEMORY:
        return "memory", 0
    if code <= 128:
        return "exited", code
    number = code - 128
    over_cpu = number == signal.SIGKILL and seconds >= math.ceil(limits.cpu_s)
    if number == signal.SIGXCPU or over_cpu:
        return "time", 0
    return "signal", number


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
