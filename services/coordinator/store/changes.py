"""Tells waiting tasks that something in the store changed, so that nobody polls or queues.

A wake-up carries nothing: who is woken reads the store. A slow watcher therefore costs no memory,
and a wake-up too many costs one read.
"""

from __future__ import annotations

import asyncio
import weakref


class Changes:
    """Wake-ups by topic. Take the wake-up first, then read: nothing in between is missed."""

    def __init__(self) -> None:
        # Lives as long as somebody waits.
        self._waiting: weakref.WeakValueDictionary[str, asyncio.Event] = (
            weakref.WeakValueDictionary()
        )
        self.closed = False

    def next(self, topic: str) -> asyncio.Event:
        """An event that is set at the next change of `topic`, or at the end."""
        waiting = self._waiting.get(topic)
        if waiting is None:
            waiting = self._waiting[topic] = asyncio.Event()
            if self.closed:
                waiting.set()
        return waiting

    def wake(self, *topics: str) -> None:
        """Wake all who wait for one of `topics`."""
        for topic in topics:
            waiting = self._waiting.pop(topic, None)
            if waiting is not None:
                waiting.set()

    def close(self) -> None:
        """Wake everybody for good: the process is going away."""
        self.closed = True
        self.wake(*list(self._waiting))
