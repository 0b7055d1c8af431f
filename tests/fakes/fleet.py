"""Waiting for a fleet to be as a test needs it."""

from __future__ import annotations

import asyncio


async def until(fleet, ready):
    """Return once `ready()`, which is asked now and after every change of `fleet`."""
    changed = asyncio.Event()
    fleet.on_change(changed.set)
    while not ready():
        changed.clear()
        await changed.wait()
