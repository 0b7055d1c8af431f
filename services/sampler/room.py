"""Room for so many things of so many bytes in all; who finds none waits."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, TypeVar

from rollmesh.errors import CapacityExhausted

if TYPE_CHECKING:
    from collections.abc import Callable

Owner = TypeVar("Owner")


class Room(Generic[Owner]):
    """Who takes what, first come, first served.

    Args:
        evict: makes one owner begin to leave (`leaves`); False: each one that is there must stay.
    """

    def __init__(self, *, max_owners: int, max_bytes: int, evict: Callable[[], bool]) -> None:
        self._max_owners = max_owners
        self._max_bytes = max_bytes
        self._evict = evict
        self._taken: dict[Owner, int] = {}
        self._leaving: set[Owner] = set()
        self._line = asyncio.Lock()
        self._changed = asyncio.Event()

    def take_at_once(self, owner: Owner, num_bytes: int) -> bool:
        """Take room for so many bytes if nobody must leave or be waited for."""
        fits = not self._line.locked() and self._fits(owner, num_bytes, self._taken)
        if fits:
            self._taken[owner] = num_bytes
        return fits

    async def take(self, owner: Owner, num_bytes: int) -> None:
        """Return once `owner` has room for so many bytes, instead of those that it had.

        Raises:
            CapacityExhausted: there can never be so much.
        """
        if num_bytes > self._max_bytes:
            raise CapacityExhausted(
                f"an adapter version of {num_bytes} bytes; max_cache is {self._max_bytes}",
                resource="max_cache",
                value=num_bytes,
                allowed=self._max_bytes,
            )
        if owner in self._taken:
            # Two that each kept theirs and waited for the other's would wait for ever.
            self._taken[owner] = 0
            self.changed()
        async with self._line:
            while not self._fits(owner, num_bytes, self._taken):
                staying = self._taken.keys() - self._leaving
                will_fit = self._fits(
                    owner, num_bytes, {other: self._taken[other] for other in staying}
                )
                if will_fit or not self._evict():
                    self._changed.clear()
                    await self._changed.wait()
            self._taken[owner] = num_bytes

    def leaves(self, owner: Owner) -> None:
        """`owner` will be freed by itself."""
        if owner in self._taken:
            self._leaving.add(owner)

    def free(self, owner: Owner) -> None:
        """`owner` has left; fine if it never had room."""
        self._taken.pop(owner, None)
        self._leaving.discard(owner)
        self.changed()

    def changed(self) -> None:
        """Somebody may be evicted now who had to stay before."""
        self._changed.set()

    def _fits(self, owner: Owner, num_bytes: int, taken: dict[Owner, int]) -> bool:
        others = [size for other, size in taken.items() if other is not owner]
        return len(others) < self._max_owners and sum(others) + num_bytes <= self._max_bytes
