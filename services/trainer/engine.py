"""The one thread that computes, and what waits for it.

Whenever the thread is free it runs the ops that wait, then forms the next pass out of whatever
batches wait: there is no clock, and no batch waits for company. Adapters take turns: the first in
the rotation says which kind and length the pass has and then goes to its end, so a long batch, cut
into units, holds nobody up for longer than a pass. The batches of one adapter run one after the
other. What its caller leaves before it has begun never runs; what has begun runs to its end, so
that a retry finds its result.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from rollmesh.errors import Overloaded, Unavailable
from services.trainer.requests import Request, advance, next_pass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rollmesh.types import Datum, ForwardResult, LossConfig
    from services.trainer.lora import LoraWeights
    from services.trainer.model import Model
    from services.trainer.requests import BatchGradients

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


class _Answer:
    """What a caller awaits; the thread ends it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self._loop.create_future()

    def give(self, compute: Callable[[], Any]) -> None:
        """End with what `compute` returns or raises."""
        try:
            end = partial(self.future.set_result, compute())
        except BaseException as error:  # noqa: BLE001 - whatever it is, the caller must hear of it
            end = partial(self.future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # Its loop is closed: nobody awaits any more.
            self._loop.call_soon_threadsafe(lambda: self.future.done() or end())


class _Op:
    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.answer = _Answer()


class _Batch:
    """`result` makes the answer of the finished request, from its times."""

    def __init__(
        self,
        adapter: str,
        request: Callable[[], Request],
        result: Callable[[Request, Mapping[str, float]], Any],
        now: float,
    ) -> None:
        self.adapter = adapter
        self.answer = _Answer()
        self.request: Request | None = None
        self.begun_at: float | None = None
        self._make_request = request
        self._result = result
        self._queued_at = now

    def prepare(self) -> Request:
        """The request, cut into units when the thread first looks at it."""
        if self.request is None:
            self.request = self._make_request()
        return self.request

    def finish(self, request: Request, now: float) -> None:
        """Answer the caller."""

        def result() -> Any:
            if request.error is not None:
                raise request.error
            begun_at = cast("float", self.begun_at)
            times = {"queued_s": begun_at - self._queued_at, "run_s": now - begun_at}
            return self._result(request, times)

        self.answer.give(result)


class Engine:
    """Runs ops and batches; at most `max_queued_ops` ops, and as many batches of an adapter, wait.

    Beside those, one op and one batch of each adapter may have begun. `broken` is called should the
    thread end by a bug: nothing can be computed after that.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_queued_ops: int,
        clock: Callable[[], float] = time.perf_counter,
        broken: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self._max_queued_ops = max_queued_ops
        self._clock = clock
        self._broken = broken
        # Guards all below; held for moments only, by the event loop as by the thread.
        self._changed = threading.Condition()
        self._ops: deque[_Op] = deque()
        # By adapter, in the order of their turns; the first of each is the one that may have begun.
        self._batches: dict[str, deque[_Batch]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="trainer-engine")
        self._thread.start()

    async def run(self, op: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `op` returns or raises, run in the thread between two passes, alone.

        Ops run in the order of their arrival.

        Raises:
            Overloaded: max_queued_ops wait already.
        """
        # The thread sees the caller's trace and log fields.
        found = _Op(partial(contextvars.copy_context().run, op, *args, **kwargs))
        with self._changed:
            self._admit(len(self._ops))
            self._ops.append(found)
            self._changed.notify()
        try:
            return cast("T", await found.answer.future)
        except asyncio.CancelledError:
            with self._changed:
                if found in self._ops:
                    self._ops.remove(found)
            raise

    async def forward_backward(
        self, adapter: str, weights: LoraWeights, data: Sequence[Datum], config: LossConfig
    ) -> BatchGradients:
        """Gradients of the summed loss of `data`, in passes shared with other adapters.

        Two more metrics: queued_s, the seconds until its first pass began, and run_s, those from
        then until its last pass ended, in which other adapters had their turns too.

        Raises:
            NonFinite: a loss or a gradient; the error names the datum.
            Overloaded: max_queued_ops wait already.
        """
        found: BatchGradients = await self._batch(
            adapter, partial(self._model.request, weights, data, config), Request.gradients
        )
        return found

    async def forward(
        self,
        adapter: str,
        weights: LoraWeights,
        data: Sequence[Datum],
        temperature: float | None = None,
        config: LossConfig | None = None,
    ) -> ForwardResult:
        """The log-probability of each target, in shared passes; with a config its metrics too.

        They are those of `forward_backward`, bit for bit.

        Raises:
            NonFinite: a log-probability or loss; the error names the datum.
            Overloaded: max_queued_ops wait already.
        """
        found: ForwardResult = await self._batch(
            adapter,
            partial(self._model.request, weights, data, config, temperature, backward=False),
            Request.result,
        )
        return found

    def close(self) -> None:
        """Return when the op or pass that runs has ended; all others fail with Unavailable."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    async def _batch(
        self,
        adapter: str,
        request: Callable[[], Request],
        result: Callable[[Request, Mapping[str, float]], Any],
    ) -> Any:
        batch = _Batch(adapter, request, result, self._clock())
        with self._changed:
            waiting = self._batches.get(adapter, ())
            self._admit(sum(each.begun_at is None for each in waiting))
            self._batches.setdefault(adapter, deque()).append(batch)
            self._changed.notify()
        try:
            return await batch.answer.future
        except asyncio.CancelledError:
            with self._changed:
                if batch.begun_at is None:
                    self._remove(batch)
            raise

    def _admit(self, num_waiting: int) -> None:
        if self._closed:
            _refuse()
        if num_waiting >= self._max_queued_ops:
            raise Overloaded(
                f"{num_waiting} ops wait, max_queued_ops is {self._max_queued_ops}",
                resource="queued ops",
                value=num_waiting,
                allowed=self._max_queued_ops,
            )

    def _remove(self, batch: _Batch) -> None:
        queue = self._batches.get(batch.adapter, deque())
        if batch in queue:
            queue.remove(batch)
            if not queue:
                del self._batches[batch.adapter]

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException:
            log.critical("the engine's thread has ended by a bug", exc_info=True)
            self._broken()
        finally:  # Also when a bug ends the thread: nobody may wait for it for ever.
            with self._changed:
                self._closed = True
                left = [op.answer for op in self._ops]
                left += [batch.answer for queue in self._batches.values() for batch in queue]
                for answer in left:
                    answer.give(_refuse)

    def _turn(self) -> bool:
        """The ops that wait, then one pass; False once the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ops or self._batches)
            num_ops = len(self._ops)
        # Those that come meanwhile wait for a pass: neither starves the other.
        for _ in range(num_ops):
            self._run_op()
        self._run_pass()
        return not self._closed

    def _run_op(self) -> None:
        with self._changed:
            op = self._ops.popleft() if self._ops and not self._closed else None
        if op is not None:
            op.answer.give(op.call)

    def _run_pass(self) -> None:
        with self._changed:
            heads = [queue[0] for queue in self._batches.values()]
        for batch in heads:
            try:
                batch.prepare()
            except Exception as error:  # noqa: BLE001 - raised to the caller of the batch at fault
                with self._changed:
                    self._remove(batch)
                batch.answer.give(partial(_raise, error))
        with self._changed:
            if self._closed:
                return
            # Some may have been left meanwhile.
            held = {queue[0] for queue in self._batches.values()}
            requests = {batch.prepare(): batch for batch in heads if batch in held}
            if not requests:
                return
            taken = next_pass(list(requests), self._model.max_batch_tokens)
            leader = requests[taken[0][0]].adapter
            self._batches[leader] = self._batches.pop(leader)
            running = [requests[request] for request in dict.fromkeys(pair[0] for pair in taken)]
            now = self._clock()
            for batch in running:
                batch.begun_at = now if batch.begun_at is None else batch.begun_at
        advance(taken, self._model.run_pass)
        for batch in running:
            request = batch.prepare()
            if request.next_unit is None:
                with self._changed:
                    self._remove(batch)
                batch.finish(request, self._clock())


def _raise(error: Exception) -> Any:
    raise error


def _refuse() -> Any:
    raise Unavailable("the trainer is going away")
