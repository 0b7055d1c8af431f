"""The engine's slots as requests see them.

One task loads and unloads: work that is scheduled, and that nobody waits for who has a slot.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import logging
from typing import TYPE_CHECKING, Self

from rollmesh.errors import InternalError, MeshError
from rollmesh.telemetry import record, span
from services.sampler.admission import Memory, Request
from services.sampler.turns import Turns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.sampler.admission import Need
    from services.sampler.backends.base import Backend, LoadedAdapter, Model

log = logging.getLogger(__name__)


class Slots:
    """Begins requests whose adapter is in a slot; an async context manager.

    Args:
        quantum_s: as Turns.
        kv_overcommit: as Memory's overcommit.
        max_completions: as Memory.
    """

    def __init__(
        self, backend: Backend, *, quantum_s: float, kv_overcommit: float, max_completions: int
    ) -> None:
        self._backend = backend
        self._memory = Memory(overcommit=kv_overcommit, max_completions=max_completions)
        self._turns = Turns(self._memory, quantum_s=quantum_s)
        self._waiting: dict[Request, asyncio.Future[None]] = {}
        # Those that were asked for and are not forgotten, by number.
        self._adapters: dict[int, LoadedAdapter] = {}
        # Of those of them that were asked for since they were loaded last.
        self._callers: dict[int, contextvars.Context] = {}
        self._proven: set[int] = set()
        # In the engine, on their way into it or out of it.
        self._inside: set[int] = set()
        self._work = asyncio.Event()
        self._unloaded = asyncio.Event()
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._swapping = self._tasks.create_task(self._swap())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._swapping.cancel()
        await self._tasks.__aexit__(None, None, None)
        self._inside.clear()
        self._unloaded.set()

    def open(self, model: Model) -> None:
        """The engine is there."""
        self._memory.open(model.kv_tokens)
        self._turns.open(model.max_loras)

    @property
    def reserved_tokens(self) -> int:
        """Tokens that those which run may come to need."""
        return self._memory.reserved_tokens

    def resident(self, adapter: LoadedAdapter) -> bool:
        """It is in a slot now."""
        return self._turns.resident(adapter.number)

    def proven(self, adapter: LoadedAdapter) -> bool:
        """It was in a slot and read back there: it is live, in a slot or not."""
        return adapter.number in self._proven

    @contextlib.asynccontextmanager
    async def use(self, adapter: LoadedAdapter | None, need: Need) -> AsyncIterator[Running]:
        """Wait for the adapter's turn and for memory; both are kept while the block runs.

        Raises:
            FailedPrecondition: the engine cannot use the adapter.
            DigestMismatch: what the engine loaded is not what it should be.
            Unavailable: the engine is dead.
        """
        request = (
            Request(adapter.number, *need, policy=adapter.policy)
            if adapter
            else Request(None, *need)
        )
        try:
            await self._begun(request, adapter)
            yield Running(self, request)
        finally:
            self._turns.end(request, _now())
            self._advance()

    async def prove(self, adapter: LoadedAdapter) -> float:
        """Return once the adapter was read back from a slot; seconds that took; errors as `use`.

        It waits for its turn, and gives it up at once.
        """
        if self.proven(adapter):
            return 0.0
        begun_at = _now()
        request = Request(adapter.number, policy=adapter.policy)
        try:
            await self._begun(request, adapter)
        finally:
            self._turns.end(request, _now())
            self._advance()
        return _now() - begun_at

    async def forget(self, adapter: LoadedAdapter) -> None:
        """Return once an adapter that nobody holds is out of the engine."""
        self._turns.forget(adapter.number)
        self._work.set()
        while adapter.number in self._inside:
            self._unloaded.clear()
            await self._unloaded.wait()
        self._proven.discard(adapter.number)
        self._adapters.pop(adapter.number, None)
        self._callers.pop(adapter.number, None)

    def end_one(self, request: Request) -> None:
        """One completion of a request has ended."""
        self._turns.end_one(request, _now())
        self._advance()

    async def _begun(self, request: Request, adapter: LoadedAdapter | None) -> None:
        if adapter is not None:
            self._adapters[adapter.number] = adapter
            self._callers[adapter.number] = contextvars.copy_context()
        begun = self._waiting[request] = asyncio.get_running_loop().create_future()
        try:
            self._turns.arrive(request)
            self._advance()
            await begun
        finally:
            del self._waiting[request]

    def _advance(self) -> None:
        """Begin what may begin; have loaded what should be."""
        self._tell(self._turns.begin())
        if self._turns.contended:
            self._work.set()

    def _tell(self, requests: list[Request], error: MeshError | None = None) -> None:
        for request in requests:
            begun = self._waiting.get(request)
            if begun is None or begun.done():
                continue  # It was cancelled a moment ago, and will end itself.
            if error is None:
                begun.set_result(None)
            else:
                # To each its own: an exception collects the traceback of everyone who raises it.
                begun.set_exception(copy.copy(error))

    async def _swap(self) -> None:
        while True:
            self._work.clear()
            swap = self._turns.swap(_now())
            self._tell(self._turns.begin())
            if swap is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(self._turns.next_at(_now())):
                        await self._work.wait()
                continue
            if swap.into is not None:
                self._inside.add(swap.into)
            if swap.out is not None:
                unloading = self._tasks.create_task(self._unload(swap.out))
            if swap.into is None:
                await unloading
            else:
                # In the trace of who asked for it last, if anybody has since it was loaded last.
                caller = self._callers.pop(swap.into, None)
                await self._tasks.create_task(self._load(swap.into), context=caller)

    async def _unload(self, number: int) -> None:
        try:
            await self._backend.unload(self._adapters[number])
        except MeshError as error:  # The engine is dead, and all in it.
            log.warning("adapter was not unloaded: %s", error)
        finally:
            self._inside.discard(number)
            self._unloaded.set()

    async def _load(self, number: int) -> None:
        adapter = self._adapters[number]
        begun_at = _now()
        try:
            with span("sampler.load", adapter=adapter.name):
                await self._backend.load(adapter)
        except MeshError as error:
            log.warning("adapter was not loaded: %s", error)
            self._failed(number, error)
        except Exception:
            log.exception("bug while loading an adapter")
            self._failed(
                number,
                InternalError(
                    "internal error; the server's log has the traceback", resource=adapter.name
                ),
            )
        else:
            record("rollmesh.sampler.load", _now() - begun_at, part="load")
            self._proven.add(number)
            self._tell(self._turns.loaded(number, _now()))
            self._advance()

    def _failed(self, number: int, error: MeshError) -> None:
        self._inside.discard(number)
        self._unloaded.set()
        self._tell(self._turns.failed(number), error)


class Running:
    """A request that has begun."""

    def __init__(self, slots: Slots, request: Request) -> None:
        self._slots = slots
        self._request = request

    def end_one(self) -> None:
        """One of its completions has ended: what it had reserved is given back."""
        self._slots.end_one(self._request)


def _now() -> float:
    return asyncio.get_running_loop().time()
