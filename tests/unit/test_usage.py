"""What was used of a day's tokens, on its way to the store."""

from __future__ import annotations

import asyncio

import pytest

from services.coordinator.usage import INTERVAL_S, UsageKeeper
from tests.fakes.virtual_time import simulate

DAY = 7
KEY = ("p", DAY)


class Line:
    """A store whose writers wait until they are let in."""

    def __init__(self):
        self.waiting = asyncio.Event()
        self.open = asyncio.Event()
        self.written = []

    async def add(self, tokens):
        self.waiting.set()
        await self.open.wait()
        self.written.append(dict(tokens))


class Counting:
    def __init__(self, tokens):
        self.tokens = tokens

    def take_usage(self):
        taken, self.tokens = self.tokens, {}
        return taken


def test_who_ends_while_it_waits_to_write_writes_once():
    async def scenario():
        store, counting = Line(), Counting({KEY: (10, 5)})
        keeper = UsageKeeper(store, counting, dispatch=lambda: None, clock=lambda: DAY * 86400.0)
        running = asyncio.create_task(keeper.run())
        await asyncio.sleep(INTERVAL_S)
        await store.waiting.wait()
        counting.tokens = {KEY: (1, 1)}
        running.cancel()
        await asyncio.sleep(0)
        store.open.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert store.written == [{KEY: (10, 5)}, {KEY: (1, 1)}]

    simulate(scenario())
