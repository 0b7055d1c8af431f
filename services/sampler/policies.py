"""A request's policy: pulled, in a slot and right there, for as long as the request goes on.

A copy that is not right in its slot is pulled once more: its files may have changed here. Where the
next copy is wrong too the engine makes something else of it, and no download would change that.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from rollmesh.errors import DigestMismatch, FailedPrecondition
from rollmesh.names import parse_adapter
from rollmesh.types import LoadTimes
from services.sampler.admission import Queue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from rollmesh.types import AdapterSource
    from services.sampler.adapters import Adapters
    from services.sampler.admission import Need
    from services.sampler.backends.base import LoadedAdapter
    from services.sampler.slots import Running, Slots

log = logging.getLogger(__name__)

T = TypeVar("T")

REMEMBERED_S = 60.0
"""For so long a version is refused of which two copies were wrong."""
_MAX_REMEMBERED = 256


class Policies:
    """Keeps policies for requests. Those that wait for a pull take no place of the others.

    Args:
        max_queued: requests that may wait for the engine; as many others may wait for pulls, and as
            many for loads.
        clock: seconds.
    """

    def __init__(
        self, adapters: Adapters, slots: Slots, *, max_queued: int, clock: Callable[[], float]
    ) -> None:
        self._adapters = adapters
        self._slots = slots
        self._requests = Queue(max_queued, "requests", clock)
        self._pulls = Queue(max_queued, "pulls", clock)
        self._loads = Queue(max_queued, "loads", clock)
        self._mismatches = _Mismatches(clock)

    @property
    def num_queued(self) -> int:
        """Requests that wait for a slot or for memory."""
        return self._requests.num_queued

    async def load(self, source: AdapterSource) -> LoadTimes:
        """Return once a version is live; errors as `Adapters.hold` and `Slots.prove`."""
        project, _ = parse_adapter(source.adapter)
        with self._loads.waiting(project):
            self._mismatches.check(source)
            pull_s = await self._adapters.pull(source)
            async with contextlib.AsyncExitStack() as held:
                _, load_s = await self._right(held, project, source, self._slots.prove)
        return LoadTimes(pull_s, load_s)

    @contextlib.asynccontextmanager
    async def use(
        self, project: str, source: AdapterSource | None, need: Need
    ) -> AsyncIterator[tuple[LoadedAdapter | None, Running]]:
        """Wait for all that a request needs, and keep it while the block runs."""
        async with contextlib.AsyncExitStack() as held:

            async def begin(adapter: LoadedAdapter | None) -> Running:
                with self._requests.waiting(project):
                    return await held.enter_async_context(self._slots.use(adapter, need))

            if source is None:
                yield None, await begin(None)
            else:
                yield await self._right(held, project, source, begin)

    async def _right(
        self,
        held: contextlib.AsyncExitStack,
        project: str,
        source: AdapterSource,
        begin: Callable[[LoadedAdapter], Awaitable[T]],
    ) -> tuple[LoadedAdapter, T]:
        """A version, kept here by `held`, and what `begin` makes of it.

        Raises:
            FailedPrecondition: the engine does not hold what the version's file says.
        """
        for again in (False, True):
            self._mismatches.check(source)
            adapter = await self._hold(held, project, source)
            try:
                begun = await begin(adapter)
            except DigestMismatch as error:
                log.warning("%s is not right in the engine: %s", adapter.name, error)
                self._mismatches.note(source, adapter, again=again)
                self._adapters.discard(adapter)
                await held.aclose()
            else:
                self._mismatches.forget(source)
                return adapter, begun
        raise _refusal(source)

    async def _hold(
        self, held: contextlib.AsyncExitStack, project: str, source: AdapterSource
    ) -> LoadedAdapter:
        holding = self._adapters.hold(source)
        if self._adapters.is_here(source):
            return await held.enter_async_context(holding)
        with self._pulls.waiting(project):
            return await held.enter_async_context(holding)


@dataclass(frozen=True, slots=True)
class _Mismatch:
    """A copy, by its adapter's number, that was not right in its slot."""

    number: int
    at: float
    again: bool
    """The copy before it was not either."""


class _Mismatches:
    """The versions with copies that were wrong of late; the oldest are forgotten first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._found: dict[tuple[str, int, str], _Mismatch] = {}

    def note(self, source: AdapterSource, adapter: LoadedAdapter, *, again: bool) -> None:
        """A copy was wrong, as one of its requests found; `again`: which had one before."""
        last = self._recent(source)
        if last is not None and not again and (last.again or adapter.number <= last.number):
            return  # All that had this copy, or an older one, find the same.
        self._found.pop(_key(source), None)
        self._found[_key(source)] = _Mismatch(
            adapter.number, self._clock(), again=again or last is not None
        )
        if len(self._found) > _MAX_REMEMBERED:
            del self._found[next(iter(self._found))]

    def forget(self, source: AdapterSource) -> None:
        """A copy was right."""
        self._found.pop(_key(source), None)

    def check(self, source: AdapterSource) -> None:
        """Refuse a version of which two copies were wrong."""
        last = self._recent(source)
        if last is not None and last.again:
            raise _refusal(source)

    def _recent(self, source: AdapterSource) -> _Mismatch | None:
        last = self._found.get(_key(source))
        return last if last is not None and self._clock() < last.at + REMEMBERED_S else None


def _refusal(source: AdapterSource) -> FailedPrecondition:
    return FailedPrecondition(
        f"{source.adapter} version {source.policy_version}: the engine does not hold what its file "
        "says",
        resource=source.adapter,
        policy_version=source.policy_version,
    )


def _key(source: AdapterSource) -> tuple[str, int, str]:
    return source.adapter, source.policy_version, source.digest
