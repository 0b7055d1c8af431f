"""The processes that isolated functions run in: a fixed number, started when first needed.

One item is the unit of work, and waiting items are served in the order of their arrival, so the
batch of one caller, however expensive, holds up another's by one item's bound at a time.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rollmesh.chat import Scored
from rollmesh.errors import BY_REASON

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Mapping
    from types import TracebackType

    from rollmesh.types import ScoreItem

_ROOT = Path(__file__).parents[2]


class Stuck(Exception):
    """The item exceeded its bounds; the message says which."""


class Workers:
    """Runs isolated functions on single items; an async context manager.

    Args:
        count: processes at most, each of which scores one item at a time.
        item_timeout_s: processor time that one item may take.
    """

    def __init__(self, count: int, item_timeout_s: float) -> None:
        self.count = count
        self._turn = asyncio.Semaphore(count)
        self._idle: list[Process] = []
        self._item_timeout_s = item_timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._idle:
            await _end(self._idle.pop())

    async def score(self, function: str, parameters: Mapping[str, Any], item: ScoreItem) -> Scored:
        """What `function` says of `item`.

        Raises:
            MeshError: as the function says.
            Stuck: it took too much time or memory, or brought its process down.
        """
        request = {"function": function, "parameters": parameters, "item": asdict(item)}
        async with self._turn:
            process = await self._process()
            try:
                line = await _exchange(process, json.dumps(request).encode() + b"\n")
            except BaseException:
                # The caller went away in the middle of an item: nobody would read the answer.
                await _end(process)
                raise
            if not line:
                raise Stuck(self._why(await process.wait()))
            self._idle.append(process)
        return _worth(json.loads(line))

    async def _process(self) -> Process:
        while self._idle:
            process = self._idle.pop()
            if process.returncode is None:
                return process
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.reward.worker",
            str(self._item_timeout_s),
            cwd=_ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # Ctrl-C in a terminal reaches every process of its group; this one ends by its parent.
            start_new_session=True,
        )

    def _why(self, status: int) -> str:
        if status == -signal.SIGPROF:
            return f"it takes more than {self._item_timeout_s:g} s of processor time"
        return f"it brought its process down (exit status {status})"


async def _exchange(process: Process, line: bytes) -> bytes:
    """The answer's line; empty when the process ended without one."""
    assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 - pipes
    try:
        process.stdin.write(line)
        await process.stdin.drain()
    except (BrokenPipeError, ConnectionResetError):
        return b""
    return await process.stdout.readline()


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


def _worth(answer: dict[str, Any]) -> Scored:
    match answer:
        case {"scored": worth}:
            return Scored(**worth)
        case {"error": reason, "message": message, "context": context}:
            raise BY_REASON[reason](message, **context)
        case {"stuck": why}:
            raise Stuck(why)
        case _:
            raise RuntimeError(answer["bug"])
