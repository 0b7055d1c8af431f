"""The versions of one job's adapter that are on the samplers, and who draws from them."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING

from services.coordinator.newest import Newest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rollmesh.types import AdapterSource


class Versions:
    """What is live of one adapter.

    Args:
        before: what an interrupted loop may have left on the samplers.
        continuing: completions under way move to each newer version, so that from the one that they
            began with on they may need all of them.
    """

    def __init__(self, *, before: range, continuing: bool) -> None:
        # The digest, of those that this loop has published itself.
        self._live: dict[int, str | None] = dict.fromkeys(before)
        self._users: Counter[int] = Counter()
        self._continuing = continuing
        self._newest: Newest | None = None

    @property
    def newest(self) -> Newest | None:
        """What completions under way follow; None: they end on what they began with."""
        return self._newest

    def went_live(self, source: AdapterSource) -> None:
        """Samplers can have it: those that do not hold it yet pull it with its first request."""
        self._live[source.policy_version] = source.digest
        if not self._continuing:
            return
        if self._newest is None:
            self._newest = Newest(source)
        self._newest.announce(source)

    @contextlib.contextmanager
    def drawn_from(self, source: AdapterSource) -> Iterator[None]:
        """In the block completions that begin with `source` may be under way."""
        self._users[source.policy_version] += 1
        try:
            yield
        finally:
            self._users[source.policy_version] -= 1
            # Not kept for ever: there is one for each step.
            self._users += Counter()

    def since(self, source: AdapterSource) -> Mapping[int, str]:
        """Digests by version of what has gone live after `source`, which is being drawn from."""
        return {
            version: digest
            for version, digest in self._live.items()
            if version > source.policy_version and digest is not None
        }

    def let_go(self, *, newest: int) -> list[int]:
        """The versions before `newest` that nobody needs: no longer live from now on."""
        oldest_used = min(self._users, default=newest)
        idle = [
            version
            for version in sorted(self._live)
            if version < newest
            and version not in self._users
            and not (self._continuing and version > oldest_used)
        ]
        for version in idle:
            del self._live[version]
        return idle
