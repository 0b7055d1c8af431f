"""Keeps one program running: started again when it dies, soon at first and then ever later."""

from __future__ import annotations

import asyncio
import collections
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollmesh.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

    from services.local.processes import Processes

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 10.0
MEMORY_S = 60.0
MOST_FAILED_STARTS = 3
BAD_CONFIGURATION = 2
"""Exit status of a service whose configuration is wrong: another start would not help."""


@dataclass(frozen=True, slots=True)
class Program:
    """What to run, where its output goes, and how long it may take to end once it is asked to."""

    name: str
    command: tuple[str, ...]
    log: Path
    stop_s: float
    environment: Mapping[str, str]


class Restarts:
    """After how long to start a program again.

    The delay doubles with each death in the last minute, up to LONGEST_DELAY_S: that is at most
    ten starts a minute, however fast it dies.
    """

    def __init__(self) -> None:
        self._deaths: collections.deque[float] = collections.deque()
        self._failed_starts = 0

    def delay_s(self, now: float, *, served: bool) -> float | None:
        """Of a program that died at `now` (seconds); None: it never served and never will."""
        self._failed_starts = 0 if served else self._failed_starts + 1
        if self._failed_starts == MOST_FAILED_STARTS:
            return None
        while self._deaths and self._deaths[0] <= now - MEMORY_S:
            self._deaths.popleft()
        self._deaths.append(now)
        return min(FIRST_DELAY_S * 2.0 ** (len(self._deaths) - 1), LONGEST_DELAY_S)


class Supervised:
    """A program that is kept running.

    Attributes:
        serving: set while it is up and `until_serving` has returned.
        pid: of the process that runs now; None: none does.
    """

    def __init__(
        self,
        program: Program,
        processes: Processes,
        *,
        until_serving: Callable[[], Awaitable[None]],
        say: Callable[[str], None],
    ) -> None:
        self.program = program
        self.serving = asyncio.Event()
        self.pid: int | None = None
        self._processes = processes
        self._until_serving = until_serving
        self._say = say
        self._process: asyncio.subprocess.Process | None = None

    async def keep_running(self) -> None:
        """Run the program, again and again, until cancelled; then end it.

        Raises:
            Unavailable: its configuration is wrong, or it died MOST_FAILED_STARTS times in a row
                before it served.
        """
        restarts = Restarts()
        while True:
            status, served = await self._run()
            delay_s = restarts.delay_s(time.monotonic(), served=served)
            ending = f"{self.program.name} {_ending(status)}"
            if delay_s is None or (status == BAD_CONFIGURATION and not served):
                raise Unavailable(
                    f"{ending}: {_last_line(self.program.log)} (log: {self.program.log})",
                    resource=self.program.name,
                )
            self._say(f"{ending}; starting it again in {delay_s:g} s (log: {self.program.log})")
            await asyncio.sleep(delay_s)

    def kill(self) -> None:
        """Kill the process that runs now, as a crash would; it is then started again."""
        assert self._process is not None, "it does not run"  # noqa: S101 - for tests
        self.serving.clear()
        self._process.kill()

    async def _run(self) -> tuple[int, bool]:
        """Run the program once: its exit status, and whether it has served."""
        self._process = process = await self._processes.start(
            self.program.command, log=self.program.log, environment=self.program.environment
        )
        self.pid = process.pid
        served = False

        async def announce() -> None:
            nonlocal served
            await self._until_serving()
            served = True
            self.serving.set()
            self._say(f"{self.program.name} is serving")

        try:
            async with asyncio.TaskGroup() as tasks:
                announcement = tasks.create_task(announce())
                status = await process.wait()
                announcement.cancel()
        finally:
            self.serving.clear()
            await self._processes.end(process, within_s=self.program.stop_s)
            self.pid = None
        return status, served


def _ending(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")
