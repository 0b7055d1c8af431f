"""Work that is taken at once and done later: the core of FutureService."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.errors import FailedPrecondition, InvalidRequest, NotFound
from rollmesh.names import check_id, parse_future, parse_project
from services.coordinator.future_samples import topic_of
from services.coordinator.future_work import FutureState
from services.coordinator.store import StoredFuture, future_taken

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.coordinator.bodies import Bodies
    from services.coordinator.future_queues import Queues
    from services.coordinator.future_samples import Samples
    from services.coordinator.future_work import Waits, Work
    from services.coordinator.store import Changes, FutureStore

DEFAULT_TIMEOUT_S = 30.0
MAX_TIMEOUT_S = 60.0
_MAX_POSITION = 2**63 - 1


class Futures:
    """Takes work, and tells how it ended.

    Args:
        store: of all but sampling.
        bodies: their bytes.
        queues: does their work.
        samples: does and keeps sampling.
        changes: hears what is done.
        waits: knows why one waits.
        max_unfinished: of one project.
        retention_s: how long a result is kept.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: FutureStore,
        bodies: Bodies,
        queues: Queues,
        samples: Samples,
        *,
        changes: Changes,
        waits: Waits,
        max_unfinished: int,
        retention_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._bodies = bodies
        self._queues = queues
        self._samples = samples
        self._changes = changes
        self._waits = waits
        self._max_unfinished = max_unfinished
        self._retention_s = retention_s
        self._clock = clock

    async def run(self) -> None:
        """Do the work until cancelled; then what is not done is a successor's."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._queues.run())
            tasks.create_task(self._samples.run())

    def close(self) -> None:
        """Whoever waits is answered at once."""
        self._changes.close()

    async def create(
        self, name: str, work: Work, *, queue: str, position: int, group: str
    ) -> FutureState:
        """Take work, and answer before it is done.

        Raises:
            InvalidRequest: the name, the queue, the position or the group.
            AlreadyExists: the name or the position is taken by other work.
            FailedPrecondition: the position was done so long ago that it is not known how.
            Overloaded: as many futures of the project are not done as may be.
            Unavailable: the database or the blob store is away.
        """
        project, _ = parse_future(name)
        _check_place(work, queue, position, group)
        if work.samples:
            if await self._store.get(name) is not None:
                raise future_taken(name)
            self._samples.create(name, project, group, work)
            return self._samples.state(name)
        if self._samples.has(name):
            raise future_taken(name)
        stored = await self._stored(name, project, work, queue, position)
        if not stored.done:
            self._queues.begin(project, queue, name)
        return await self._state(stored)

    async def wait(self, name: str, *, timeout_s: float | None) -> FutureState:
        """One future once it is done, or as it is after `timeout_s`; None: DEFAULT_TIMEOUT_S.

        Raises:
            InvalidRequest: the name or the time-out.
            NotFound: there is none, or its result is kept no longer.
            Unavailable: the database or the blob store is away.
        """
        parse_future(name)
        until = _until(timeout_s)
        while True:
            changed = self._changes.next(name)
            state = await self._current(name)
            if state.result is not None or not await self._is_set(changed, until):
                return await self._explained(state)

    async def wait_many(
        self, parent: str, group: str, after: int, *, timeout_s: float | None
    ) -> list[tuple[int, str, bool]]:
        """Cursor, name, and whether it failed, of what of a group of samples is done since `after`.

        In the order in which they came to be done; empty: none did within `timeout_s`.

        Raises:
            InvalidRequest: the project, the group, `after` or the time-out.
        """
        project = parse_project(parent, field="project")
        if group:
            check_id(group, field="group")
        if after < 0:
            raise InvalidRequest(f"after: {after} is not ≥ 0", field="after", value=after)
        until = _until(timeout_s)
        while True:
            changed = self._changes.next(topic_of(project, group))
            found = self._samples.done_since(project, group, after)
            if found or not await self._is_set(changed, until):
                return found

    async def cancel(self, name: str) -> None:
        """Stop a future of sampling; one that is done stays as it is.

        Raises:
            InvalidRequest: the name.
            NotFound: there is none, or its result is kept no longer.
            FailedPrecondition: it is of other work.
        """
        parse_future(name)
        if self._samples.has(name):
            self._samples.cancel(name)
            return
        await self._existing(name)
        raise FailedPrecondition(f"{name} is not of sampling and is not stopped", resource=name)

    async def _stored(
        self, name: str, project: str, work: Work, queue: str, position: int
    ) -> StoredFuture:
        """The row of the work, which is there from now on if it was not before."""
        future = StoredFuture(
            name=name,
            project=project,
            queue=queue,
            position=position,
            digest=hashlib.sha256(work.body).hexdigest(),
            adapter=work.adapter,
            create_time=self._clock(),
        )
        # A large body is not written for a repeat, or where there is no room.
        found = await self._store.find(future, max_unfinished=self._max_unfinished)
        if found is not None:
            return found
        body, key = await self._bodies.put(work.body)
        future = dataclasses.replace(future, body=body, body_key=key)
        return await self._store.create(future, max_unfinished=self._max_unfinished)

    async def _current(self, name: str) -> FutureState:
        if self._samples.has(name):
            return self._samples.state(name)
        return await self._state(await self._existing(name))

    async def _existing(self, name: str) -> StoredFuture:
        stored = await self._store.get(name)
        if stored is None or self._is_old(stored):
            raise NotFound(f"there is no {name}, or it was done long ago", resource=name)
        return stored

    def _is_old(self, stored: StoredFuture) -> bool:
        return stored.done_time is not None and stored.done_time < self._clock() - self._retention_s

    async def _state(self, stored: StoredFuture) -> FutureState:
        result = None
        if stored.done:
            if self._is_old(stored):
                raise NotFound(
                    f"{stored.name} was done long ago, and it is not known how",
                    resource=stored.name,
                )
            result = await self._bodies.get(stored.result, stored.result_key)
        return FutureState(stored.name, stored.create_time, result, self._waits.of(stored.name))

    async def _explained(self, state: FutureState) -> FutureState:
        """`state` with what it waits for in its queue, if that is what it does."""
        if state.result is not None or state.waiting is not None or self._samples.has(state.name):
            return state
        stored = await self._existing(state.name)
        if stored.done or not stored.queue:
            return await self._state(stored)
        position = await self._store.next_position(stored.project, stored.queue)
        if position >= stored.position:
            return state
        came = await self._store.has(stored.project, stored.queue, position)
        reason = f"position {position} of queue {stored.queue!r} has not " + (
            "ended" if came else "come"
        )
        waiting = types.Waiting(
            subject=state.name,
            rule="ORDER",
            reason=reason,
            release=f"the end of what is before position {stored.position}",
            position=1 + stored.position - position,
            since=stored.create_time,
        )
        return dataclasses.replace(state, waiting=waiting)

    async def _is_set(self, changed: asyncio.Event, until: float) -> bool:
        """Wait for it; False: there is no more time for that."""
        if self._changes.closed:
            return False
        try:
            async with asyncio.timeout_at(until):
                await changed.wait()
        except TimeoutError:
            return False
        return True


def _check_place(work: Work, queue: str, position: int, group: str) -> None:
    if queue:
        check_id(queue, field="queue")
    if group:
        check_id(group, field="group")
    if queue and work.samples:
        raise InvalidRequest(
            "queue: sampling is in none", field="queue", value=queue, allowed="none with sample"
        )
    if group and not work.samples:
        raise InvalidRequest(
            "group: only sampling has one",
            field="group",
            value=group,
            allowed="none without sample",
        )
    most = _MAX_POSITION if queue else 0
    if not 0 <= position <= most:
        raise InvalidRequest(
            f"position: {position} is not in [0, {most}]",
            field="position",
            value=position,
            allowed="≥ 0 with a queue, 0 without",
        )


def _until(timeout_s: float | None) -> float:
    seconds = DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s
    if not 0 <= seconds <= MAX_TIMEOUT_S:
        raise InvalidRequest(
            f"timeout: {seconds:g} s is not in [0, {MAX_TIMEOUT_S:g}]",
            field="timeout",
            value=seconds,
            allowed=f"0 to {MAX_TIMEOUT_S:g} s",
        )
    return asyncio.get_running_loop().time() + seconds
