"""Processes that leave nothing behind: each leads a session, which dies with it.

Should this process be killed, a sentinel process kills the sessions that are left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from services.local.sentinel import kill_session, members

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

# The child tells the sentinel of itself before it becomes the program, and holds the sentinel's
# input open until then: there is no moment at which it could be forgotten.
_BECOME = 'echo "+$$" >&0; exec "$@" </dev/null'


LEFTOVERS_S = 3.0
"""For the children of a process that has ended to end by themselves."""
POLL_S = 0.05


class Processes:
    """Starts processes in sessions that the sentinel knows."""

    def __init__(self, to_sentinel: int) -> None:
        self._to_sentinel = to_sentinel

    async def start(
        self, command: Sequence[str], *, log: Path, environment: Mapping[str, str]
    ) -> asyncio.subprocess.Process:
        """Start `command` with `environment` added to ours; its output is appended to `log`."""
        with log.open("ab") as output:
            return await asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", _BECOME, "sh", *command),
                stdin=self._to_sentinel,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                # Of its own, so that Ctrl-C on the terminal reaches us alone.
                start_new_session=True,
            )

    async def end(self, process: asyncio.subprocess.Process, *, within_s: float) -> None:
        """Ask the process to end, after `within_s` seconds make it; its session ends with it."""
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await process.wait()
        if process.returncode is not None:
            # What it left behind may tidy up after it, as vLLM does with its shared memory.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEFTOVERS_S):
                    while members(process.pid):  # noqa: ASYNC110 - they are no children of ours
                        await asyncio.sleep(POLL_S)
        # Also after a process that has ended well: nobody else ends what is still there.
        kill_session(process.pid)
        await process.wait()
        os.write(self._to_sentinel, f"-{process.pid}\n".encode())


@contextlib.asynccontextmanager
async def processes() -> AsyncIterator[Processes]:
    """A sentinel, and what starts processes under it."""
    sentinels, ours = os.pipe()
    try:
        sentinel = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(Path(__file__).with_name("sentinel.py"))),
            stdin=sentinels,
            start_new_session=True,
        )
    finally:
        os.close(sentinels)
    try:
        yield Processes(ours)
    finally:
        os.close(ours)
        await sentinel.wait()
