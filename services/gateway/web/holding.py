"""How many bytes of requests a gateway holds at once, in all and of each project."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING

from rollmesh.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import Iterator


class Held:
    """The bytes of one request. `project`: whose they are, once that is known."""

    def __init__(self, holding: Holding) -> None:
        self.project = ""
        self._holding = holding
        self._taken: Counter[str] = Counter()

    def take(self, num_bytes: int) -> None:
        """Hold so many more, until the request is answered.

        Raises:
            Overloaded: there is no room for them now.
        """
        self._holding.take(self.project, num_bytes)
        self._taken[self.project] += num_bytes

    def drop(self) -> None:
        """Hold nothing."""
        self._holding.drop(self._taken)
        self._taken.clear()


class Holding:
    """Room for `max_bytes`, of which one project has half at most: there is room for others."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._of: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        """How many there are now."""
        return self._of.total()

    @contextlib.contextmanager
    def request(self) -> Iterator[Held]:
        """Its bytes, which are let go of at the end of the block."""
        held = Held(self)
        try:
            yield held
        finally:
            held.drop()

    def take(self, project: str, num_bytes: int) -> None:
        """As `Held.take`."""
        for held, most, whose in (
            (self._of[project], self._max_bytes // 2, "of this project's requests"),
            (self.num_bytes, self._max_bytes, "of requests"),
        ):
            if held + num_bytes > most:
                raise Overloaded(
                    f"{held} bytes {whose} are held here, of {most} at most: "
                    f"no room for {num_bytes} more",
                    resource=project or "gateway",
                    allowed=most,
                )
        self._of[project] += num_bytes

    def drop(self, taken: Counter[str]) -> None:
        """Let go of so many bytes of each project."""
        self._of -= taken
