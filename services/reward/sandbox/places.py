"""Runs untrusted Python: bounded, blind and deaf, and gone when it ends, whatever it does.

Nothing of a run outlives the block that it is in, and no more than `max_runs` places are taken at
once; who waits for one is served in order of arrival. A caller that is cancelled ends its run.
"""

from __future__ import annotations

import asyncio
import contextlib
import marshal
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rollmesh.errors import Unavailable
from services.reward.sandbox.limits import Limits, Outcome, Program, ended

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator

    from services.reward.sandbox.tools import Command, Tool

FIRST_USER = 59000
"""Real user and group of the first place, where the service runs as root: one for each place. They
own nothing, and have no names."""
START_S = 30.0
"""In which a sandbox has to come up, on however busy a machine."""

_STAGE = (Path(__file__).parent / "stage.py").read_text()
_CHUNK = 1 << 16


class Sandbox:
    """Where untrusted Python runs.

    Args:
        tool: what makes the sandboxes.
        max_runs: places: programs that compute at once.
        max_cpu_s: most processor time that a caller may ask for a program.
        max_memory_bytes: most memory.
    """

    def __init__(
        self,
        tool: Tool,
        *,
        max_runs: int,
        max_cpu_s: float = 30.0,
        max_memory_bytes: int = 1 << 30,
    ) -> None:
        self.tool = tool
        self.max_cpu_s = max_cpu_s
        self.max_memory_bytes = max_memory_bytes
        self.count = max_runs
        self._turns = asyncio.Semaphore(max_runs)
        self._free = list(range(max_runs))

    def __str__(self) -> str:
        return self.tool.name

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[Place]:
        """A place of its own, once it is its turn."""
        async with self._turns:
            number = self._free.pop()
            try:
                yield Place(self, FIRST_USER + number if os.geteuid() == 0 else None)
            finally:
                self._free.append(number)

    async def run(
        self, program: Program, *, stdin: bytes = b"", limits: Limits | None = None
    ) -> Outcome:
        """Run `program` to its end, in a place of its own. Errors as of Place.run."""
        async with self.place() as place:
            return await place.run(program, stdin=stdin, limits=limits)


class Place:
    """Programs of one caller, one after another, or two that wait for each other.

    `user`: real user and group. None: the service's own.
    """

    def __init__(self, sandbox: Sandbox, user: int | None) -> None:
        self._sandbox = sandbox
        self._user = user

    async def run(
        self, program: Program, *, stdin: bytes = b"", limits: Limits | None = None
    ) -> Outcome:
        """Run `program` to its end.

        Raises:
            Unavailable: the sandbox did not come up.
        """
        async with self.start(program, limits or Limits()) as running:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(running.write(stdin, last=True))
                tasks.create_task(running.drain())
                await running.wait()
            return running.outcome()

    @contextlib.asynccontextmanager
    async def start(self, program: Program, limits: Limits) -> AsyncIterator[Running]:
        """`program` while it runs; it is killed when the block is left.

        Raises:
            Unavailable: the sandbox did not come up.
        """
        began = time.monotonic()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(0)
            python = ("-s", "-S", "-P", "-B", "-X", "utf8", "-c", _STAGE, str(theirs.fileno()))
            with self._sandbox.tool.command(self._user, limits, theirs.fileno(), python) as command:
                process = await _started(command, limits)
            theirs.close()
            try:
                await self._begin(process, ours, program, limits)
                yield Running(process, limits, began)
            finally:
                _kill(process)
                await process.wait()

    async def _begin(
        self, process: Process, control: socket.socket, program: Program, limits: Limits
    ) -> None:
        """Tell stage.py what to run, and see it begin."""
        loop = asyncio.get_running_loop()
        order = (dict(program.files), list(program.argv), dict(limits.of_process()))
        said = b""
        try:
            async with asyncio.timeout(START_S):
                said = await loop.sock_recv(control, 1)
                if said:
                    await loop.sock_sendall(control, marshal.dumps(order))
                    said += await loop.sock_recv(control, 1)
        except (TimeoutError, ConnectionError):
            pass
        if said == b"rb":
            return
        _kill(process)
        _, problem = await process.communicate()
        raise Unavailable(
            f"{self._sandbox.tool.name} made no sandbox: "
            f"{problem.decode(errors='replace').strip()[-500:] or 'it said nothing'}"
        )


class Running:
    """A program that runs. Its output is read, line by line or whole, up to its limit."""

    def __init__(self, process: Process, limits: Limits, began: float) -> None:
        assert process.stdin and process.stdout and process.stderr  # noqa: S101, PT018 - pipes
        self._process = process
        self._limits = limits
        self._began = began
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr
        self._kept = {self._stdout: bytearray(), self._stderr: bytearray()}
        self._is_over = False
        self._is_late = False
        self._seconds = 0.0

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Write to its standard input, which it may have closed; with `last`, close it."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._stdin.write(data)
            await self._stdin.drain()
        if last:
            self._stdin.close()

    async def read_line(self) -> bytes:
        """The next line of its standard output, with its end; without where that is the last.

        Empty: there is none. It has ended; or it said too much or took too long, and is ended.
        """
        try:
            async with asyncio.timeout_at(self._deadline()):
                return await self._stdout.readline()
        except ValueError:
            self._is_over = True
        except TimeoutError:
            self._is_late = True
        self.kill()
        return b""

    async def drain(self) -> None:
        """Read its output to the end."""
        async with asyncio.TaskGroup() as tasks:
            for stream in self._kept:
                tasks.create_task(self._drain(stream))

    async def _drain(self, stream: asyncio.StreamReader) -> None:
        kept = self._kept[stream]
        while chunk := await stream.read(_CHUNK):
            room = self._limits.output_bytes - len(kept)
            kept += chunk[:room]
            if len(chunk) > room:
                self._is_over = True
                self.kill()

    def kill(self) -> None:
        """End it."""
        _kill(self._process)

    async def wait(self) -> None:
        """Return when it has ended: by itself, or because its wall time is over."""
        try:
            async with asyncio.timeout_at(self._deadline()):
                await self._process.wait()
        except TimeoutError:
            self._is_late = True
            self.kill()
            await self._process.wait()
        self._seconds = time.monotonic() - self._began

    def outcome(self) -> Outcome:
        """What came of it, after `wait`."""
        assert self._process.returncode is not None  # noqa: S101 - it was waited for
        status, code = ended(self._process.returncode, self._seconds, self._limits)
        if self._is_over:
            status = "output"
        elif self._is_late:
            status = "time"
        stdout, stderr = (bytes(kept) for kept in self._kept.values())
        return Outcome(status, code, stdout, stderr, self._seconds)

    def _deadline(self) -> float:
        loop = asyncio.get_running_loop()
        return loop.time() + self._limits.wall_s - (time.monotonic() - self._began)


async def _started(command: Command, limits: Limits) -> Process:
    """The process, as leader of a group of its own."""
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *command.arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=limits.output_bytes,
            pass_fds=command.inherited,
            env={},
            cwd="/",
            start_new_session=True,
        )
    )
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        # Broken off, it would end the process alone, and not what that has forked by then.
        process = await starting
        _kill(process)
        await process.wait()
        raise


def _kill(process: Process) -> None:
    """End the sandbox that `process` makes or has made.

    With its group: what bubblewrap has forked waits for it at first, for ever, and only later dies
    with it. The first process of the sandbox is in the group, and with that ends all in it.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
