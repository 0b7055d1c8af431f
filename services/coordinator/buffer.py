"""The groups of one job between their admission and their training step.

Groups are numbered as they are admitted and trained in that order: group i in step i // G, G being
groups_per_step. A group is admitted while fewer than (max_staleness + 1)·G are in the pipeline, and
leaves it once the policy that it trained is live. So step i // G − max_staleness − 1 has been
finished when group i is admitted: it never gets more than max_staleness versions old, without
anything being thrown away. Training out of order could not promise that: a straggler would age.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.coordinator.groups import Group


class RolloutBuffer:
    """Numbers for the groups that may start, and the groups that are ready, in order."""

    def __init__(
        self, *, groups_per_step: int, max_staleness: int, first_step: int, last_step: int
    ) -> None:
        """For the steps from `first_step` up to but not including `last_step`."""
        self._free = (max_staleness + 1) * groups_per_step
        self._next_to_admit = self._next_to_take = first_step * groups_per_step
        self._end = last_step * groups_per_step
        # Bounded by the slots.
        self._ready: dict[int, Group] = {}
        self._arrived = asyncio.Event()

    def admit(self) -> range:
        """The numbers of the groups that may start now: all for which there are free slots."""
        first = self._next_to_admit
        self._next_to_admit = min(first + self._free, self._end)
        self._free -= self._next_to_admit - first
        return range(first, self._next_to_admit)

    def put(self, group: Group) -> None:
        """An admitted group is sampled and scored."""
        self._ready[group.number] = group
        self._arrived.set()

    def missing(self, numbers: range) -> list[int]:
        """Those of `numbers`, just admitted, that are not ready yet."""
        return [number for number in numbers if number not in self._ready]

    async def take(self, count: int) -> list[Group]:
        """The next `count` groups in the order of their numbers, once all of them are ready."""
        numbers = range(self._next_to_take, self._next_to_take + count)
        while not all(number in self._ready for number in numbers):
            self._arrived.clear()
            await self._arrived.wait()
        self._next_to_take = numbers.stop
        return [self._ready.pop(number) for number in numbers]

    def waiting(self) -> list[Group]:
        """Those that are ready before their step's turn, in order."""
        return [self._ready[number] for number in sorted(self._ready)]

    def release(self, count: int) -> None:
        """As many groups have been trained, and the policy they made is live."""
        self._free += count
