"""Which tool makes sandboxes on this machine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rollmesh.errors import FailedPrecondition
from services.reward.sandbox.choice import TOOLS


def first_tool(made):
    """The first that there is; a test that needs one is skipped where there is none."""
    problems = []
    for tool in TOOLS.values():
        try:
            return tool(made)
        except FailedPrecondition as missing:
            problems.append(str(missing))
    pytest.skip("; ".join(problems))


def processes_of(folder):
    """Of its sandboxes: who makes one names the runtime's folder, who is in it has it as root."""
    name = folder.name.encode()
    return [entry for entry in Path("/proc").iterdir() if name in _said_of(entry)]


def _said_of(process):
    try:
        return (process / "cmdline").read_bytes() + (process / "mountinfo").read_bytes()
    except OSError:
        return b""


async def until_gone(folder):
    """Return when no process of a sandbox is left: the kernel ends them in its own time."""
    async with asyncio.timeout(20):
        while processes_of(folder):
            await asyncio.sleep(0.01)
