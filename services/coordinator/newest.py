"""The newest version of an adapter that can be sampled, for completions that move on to it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rollmesh.types import AdapterSource


class Newest:
    """What is newest now, and word of what comes."""

    def __init__(self, source: AdapterSource | None = None) -> None:
        self._source = source
        self._notices: set[Callable[[], None]] = set()

    @property
    def source(self) -> AdapterSource:
        """The newest version, once there is one."""
        assert self._source is not None  # noqa: S101 - who follows resolves before anything is drawn
        return self._source

    def announce(self, source: AdapterSource) -> None:
        """`source` can be sampled; an older one than is known changes nothing."""
        if self._source is None or source.policy_version > self._source.policy_version:
            self._source = source
            notices, self._notices = self._notices, set()
            for notice in notices:
                notice()

    @contextlib.contextmanager
    def noticing(self, notice: Callable[[], None]) -> Iterator[None]:
        """Call `notice` once, with the first newer version that comes while the block runs."""
        self._notices.add(notice)
        try:
            yield
        finally:
            self._notices.discard(notice)


class Publications:
    """The newest versions of the adapters that somebody follows; of others it knows nothing."""

    def __init__(self) -> None:
        self._followed: WeakValueDictionary[str, Newest] = WeakValueDictionary()

    def follow(self, adapter: str) -> Newest:
        """What is newest of `adapter`, for as long as the caller keeps it.

        The caller follows first, then announces to it what it resolves: so it misses nothing that
        is published in between.
        """
        return self._followed.setdefault(adapter, Newest())

    def announce(self, source: AdapterSource) -> None:
        """`source` was published."""
        if newest := self._followed.get(source.adapter):
            newest.announce(source)

    def forget(self, adapter: str) -> None:
        """`adapter` is deleted; another one of that name begins anew.

        Whoever follows it keeps what it has and hears of nothing more.
        """
        self._followed.pop(adapter, None)
