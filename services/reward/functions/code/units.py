"""Code as a module with tests: the tests run in one sandbox, the completion in another.

This passes their lines on, unread but for what the tests say to it. Neither can reach the other but
by these lines, so no test is known to the completion, and no verdict is the completion's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rollmesh.errors import InvalidRequest
from services.reward.functions.code.reference import MAX_TESTS
from services.reward.sandbox import Program

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from services.reward.functions.code.reference import CodeReference
    from services.reward.sandbox import Limits, Place, Running

_INSIDE = {
    name: (Path(__file__).parent / "inside" / name).read_bytes()
    for name in ("peer.py", "candidate.py", "tester.py")
}
_MAX_LINE_BYTES = 4 << 20
_CPU_S = 10.0
"""Of the tests themselves, all together; what they ask the completion is its time."""


async def run_tests(
    place: Place,
    code: str,
    reference: CodeReference,
    limits: Limits,
    *,
    names: tuple[str, ...],
    in_place: bool,
) -> AsyncGenerator[tuple[str, str]]:
    """Each test's name and what went wrong (empty: nothing), as they end.

    The first is ("", N): there are N tests. Those that are not told have failed.

    Raises:
        InvalidRequest: the tests cannot be run, whatever the completion is.
    """
    order = {
        "tests": reference.tests,
        "setup": reference.setup,
        "names": names,
        "in_place": in_place,
    }
    tests = Program(
        {
            "main.py": _INSIDE["tester.py"],
            "peer.py": _INSIDE["peer.py"],
            "order.json": json.dumps(order).encode(),
        }
    )
    # It waits while the completion works, which is not its fault.
    patience = replace(
        limits, cpu_s=_CPU_S, output_bytes=_MAX_LINE_BYTES, idle_s=MAX_TESTS * limits.wall_s
    )
    async with place.start(tests, patience) as tester, contextlib.AsyncExitStack() as stack:
        candidate = _Candidate(place, code, replace(limits, output_bytes=_MAX_LINE_BYTES), stack)
        while line := await _said(tester, limits):
            kind, text = line[:1], line[1:]
            match kind:
                case b"T":
                    yield "", text.decode().strip()
                case b"N":
                    await candidate.renew()
                case b"C":
                    await tester.write(await candidate.asked(text))
                case b"R":
                    name, problem = json.loads(text)
                    yield name, problem
                case _:
                    problem = json.loads(text)
                    raise InvalidRequest(problem, field="reference", value=problem[:100])
        await tester.wait()
        outcome = tester.outcome()
        if not outcome.is_well:
            # Of the tests; or what the completion gave them was too much. They all fail from here.
            yield "tests", f"they ended: {outcome}"


async def _said(tester: Running, limits: Limits) -> bytes:
    """What the tests say next; empty: no more."""
    try:
        async with asyncio.timeout(_CPU_S + limits.idle_s):
            return await tester.read_line()
    except TimeoutError:
        tester.kill()
        return b""


class _Candidate:
    """The completion, newly begun for each test."""

    def __init__(
        self, place: Place, code: str, limits: Limits, stack: contextlib.AsyncExitStack
    ) -> None:
        self._place = place
        self._limits = limits
        self._program = Program(
            {
                "main.py": _INSIDE["candidate.py"],
                "peer.py": _INSIDE["peer.py"],
                "completion.py": code.encode(errors="replace"),
            }
        )
        self._stack = stack
        self._running: Running | None = None

    async def renew(self) -> None:
        """End the one there is, and begin another."""
        await self._stack.aclose()
        self._running = await self._stack.enter_async_context(
            self._place.start(self._program, self._limits)
        )

    async def asked(self, line: bytes) -> bytes:
        """What it answers, for the tests to hear; or why it does not."""
        if self._running is None:
            return b"Xit has ended before\n"
        await self._running.write(line)
        answer = await self._running.read_line()
        if answer.endswith(b"\n"):
            return b"A" + answer
        await self._running.wait()
        outcome = self._running.outcome()
        self._running = None
        return f"X{outcome}\n".encode()
