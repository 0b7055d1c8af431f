"""What a sandbox costs before the program does anything."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from services.reward.sandbox.limits import Program

if TYPE_CHECKING:
    from services.reward.sandbox.places import Sandbox


async def start_s(sandbox: Sandbox, *, runs: int) -> float:
    """The median of seconds that an empty program takes, of `runs` one after another."""
    program = Program({"main.py": b"pass"})
    return statistics.median([(await sandbox.run(program)).seconds for _ in range(runs)])
