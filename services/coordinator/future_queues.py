"""Does the work of stored futures: of each queue in the order of positions, else at once.

Training ops of one adapter go one at a time, from the moment on when their sequence is chosen until
their result is stored. So whoever repeats an op after a crash finds its sequence as it left it: not
used, or used by that op.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from functools import partial
from typing import TYPE_CHECKING

from rollmesh.errors import AlreadyExists, InternalError, MeshError, NotFound
from services.coordinator.store import Changes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from services.coordinator.bodies import Bodies
    from services.coordinator.future_work import Waits, Works
    from services.coordinator.store import FutureStore, StoredFuture

log = logging.getLogger(__name__)


class Queues:
    """One task for each queue that has work, and for each future without a queue.

    Unfinished futures are bounded, and so are these.

    Args:
        store: where futures are.
        bodies: their bytes.
        works: does the work.
        next_sequence: of an adapter, by name, once its last op has been settled.
        changes: hears the name of each future that is done.
        waits: where it stands why one waits.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: FutureStore,
        bodies: Bodies,
        works: Works,
        *,
        next_sequence: Callable[[str], Awaitable[int]],
        changes: Changes,
        waits: Waits,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._bodies = bodies
        self._works = works
        self._next_sequence = next_sequence
        self._changes = changes
        self._waits = waits
        self._clock = clock
        self._tasks: asyncio.TaskGroup | None = None
        # Of the queues that are worked on: set when something has come.
        self._stirred: dict[tuple[str, str], asyncio.Event] = {}
        self._alone: set[str] = set()
        # By adapter: the future that trains it.
        self._training: dict[str, str] = {}
        self._freed = Changes()

    async def run(self) -> None:
        """Go on with whatever is not done, then with what comes, until cancelled.

        What is under way then stays as it is, for a successor.
        """
        async with asyncio.TaskGroup() as tasks:
            self._training = await self._waits.out("training futures", self._store.training)
            self._tasks = tasks
            try:
                unfinished = await self._waits.out("unfinished futures", self._store.unfinished)
                for project, queue, name in unfinished:
                    self.begin(project, queue, name)
                await asyncio.Event().wait()
            finally:
                self._tasks = None

    def begin(self, project: str, queue: str, name: str) -> None:
        """A future was stored; `queue` "": it is in none."""
        if self._tasks is None:
            return  # `run` finds it.
        key = project, queue
        if not queue:
            if name not in self._alone:
                self._alone.add(name)
                self._tasks.create_task(self._do_alone(name))
        elif key in self._stirred:
            self._stirred[key].set()
        else:
            self._stirred[key] = asyncio.Event()
            self._tasks.create_task(self._do_queue(*key))

    async def _do_alone(self, name: str) -> None:
        try:
            future = await self._waits.out(name, partial(self._store.get, name))
            if future is not None and not future.done:
                await self._do(future)
        finally:
            self._alone.discard(name)

    async def _do_queue(self, project: str, queue: str) -> None:
        stirred = self._stirred[project, queue]
        subject = f"queue {queue} of projects/{project}"
        try:
            while True:
                stirred.clear()
                future = await self._waits.out(subject, partial(self._store.next, project, queue))
                if future is not None:
                    await self._do(future)
                elif not stirred.is_set():
                    return
        finally:
            del self._stirred[project, queue]

    async def _do(self, future: StoredFuture) -> None:
        """Once this returns it is done and stored."""
        async with self._turn(future):
            result = await self._result(future)
            stored = await self._waits.out(future.name, partial(self._bodies.put, result))
            finish = partial(self._store.finish, future.name, *stored, now=self._clock())
            await self._waits.out(future.name, finish)
        self._changes.wake(future.name)

    @contextlib.asynccontextmanager
    async def _turn(self, future: StoredFuture) -> AsyncIterator[None]:
        if not future.adapter:
            yield
            return
        # One that had begun before a crash is there from the start.
        while self._training.setdefault(future.adapter, future.name) != future.name:
            await self._freed.next(future.adapter).wait()
        yield
        # Whoever fails here is cancelled, with all others.
        del self._training[future.adapter]
        self._freed.wake(future.adapter)

    async def _result(self, future: StoredFuture) -> bytes:
        try:
            body = await self._waits.out(future.name, partial(self._body, future))
            if future.adapter:
                return await self._train(future, body)
            return await self._waits.out(future.name, partial(self._works.do, future.name, body, 0))
        except MeshError as error:
            return self._works.failure(error)
        except Exception:
            log.exception("%s failed by a bug", future.name)
            return self._works.failure(InternalError("the work failed by a bug; see the log"))

    async def _body(self, future: StoredFuture) -> bytes:
        try:
            body = await self._bodies.get(future.body, future.body_key)
        except NotFound:
            body = b""
        if hashlib.sha256(body).hexdigest() != future.digest:
            log.error("the work of %s is not in the blob store as written", future.name)
            raise InternalError(f"the work of {future.name} is lost", resource=future.name)
        return body

    async def _train(self, future: StoredFuture, body: bytes) -> bytes:
        sequence = future.sequence
        while True:
            if sequence is None:
                sequence = await self._waits.out(future.name, partial(self._assign, future))
            attempt = partial(self._works.do, future.name, body, sequence)
            try:
                return await self._waits.out(future.name, attempt)
            except AlreadyExists as error:
                # Who trains it beside its futures was quicker.
                log.info("%s: %s", future.name, error)
                sequence = None

    async def _assign(self, future: StoredFuture) -> int:
        sequence = await self._next_sequence(future.adapter)
        await self._store.assign(future.name, sequence)
        return sequence
