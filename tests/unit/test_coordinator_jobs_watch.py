"""Watching a job loses nothing, wherever a write falls between a look and a wait."""

from __future__ import annotations

import asyncio

import pytest

from rollmesh.job import JobEvent, StateChanged, Warned
from services.coordinator.jobs import Jobs
from services.coordinator.store import Changes, EventPage

J = "projects/p/jobs/j"


class Memory:
    """One job's events; `later` are written one by one, each behind the back of a look."""

    def __init__(self, *later) -> None:
        self.changes = Changes()
        self.num_reads = 0
        self._events = [self._event(1, Warned(reason="R", message="first"))]
        self._later = list(later)

    @staticmethod
    def _event(number, happening):
        return JobEvent(number=number, time=0.0, event=happening)

    async def events(self, name, *, after):
        self.num_reads += 1
        found = EventPage(self._events[after:][:2], len(self._events), ended=False)
        # Written after the look, and told before whoever looks hears that it saw nothing.
        if self._later and not found.events:
            self._events.append(self._event(len(self._events) + 1, self._later.pop(0)))
            self.changes.wake(name)
        await asyncio.sleep(0)
        return found


def watching(store):
    jobs = Jobs(
        store,
        None,
        None,
        base_models=None,
        checks=None,
        projects=None,
        queue=None,
        problems=None,
        max_pending=1,
        clock=lambda: 0.0,
        new_id=lambda: "j",
    )
    return jobs.watch(J, 0)


END = StateChanged(from_state="RUNNING", to_state="SUCCEEDED")


@pytest.mark.parametrize("num_warnings", [0, 1, 2, 5])
async def test_a_write_behind_the_back_of_a_look_is_not_missed(num_warnings):
    store = Memory(*[Warned(reason="R", message="m")] * num_warnings, END)
    async with asyncio.timeout(5):
        events = [event async for event in watching(store)]
    assert [event.number for event in events] == list(range(1, num_warnings + 3))


async def test_who_waits_does_not_look_until_something_happened():
    store = Memory()
    events = watching(store)
    assert (await anext(events)).number == 1
    waiting = asyncio.ensure_future(anext(events))
    for _ in range(20):
        await asyncio.sleep(0)
    reads = store.num_reads
    for _ in range(20):
        store.changes.wake("projects/p/jobs/another")
        await asyncio.sleep(0)
    assert store.num_reads == reads
    waiting.cancel()


async def test_nothing_is_kept_of_those_who_wait_no_longer():
    changes = Changes()
    waits = [changes.next(f"job-{n}") for n in range(3)]
    assert len(changes._waiting) == 3
    changes.wake("job-0")
    assert waits[0].is_set()
    waits.clear()
    assert len(changes._waiting) == 0
