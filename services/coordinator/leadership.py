"""Which of several coordinators on one database leads.

The leader says at short intervals that it is alive, by raising a number in the store. A follower
that sees the number unchanged for the lease, by its own clock, takes over by raising the epoch. No
two clocks are compared. What keeps a leader that was merely slow from doing harm is not the time
but the epoch: every write checks it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol, TypeVar

from rollmesh.errors import NotLeader
from rollmesh.ticks import TICK_S, in_ticks
from services.coordinator.store import Deposed, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from services.coordinator.store import Leader

Answer = TypeVar("Answer")

log = logging.getLogger(__name__)

_LOOK_S = 0.25
"""How often a follower looks: a clean shutdown is followed by another leader in this time."""
_LATE_AFTER = 2 / 3
"""Of the lease: a leader that could not renew it for so long says so before others take over."""


class Store(Protocol):
    """What store.LeadershipStore does."""

    @property
    def in_turn(self) -> bool:
        """Whether a second try could only wait behind the first."""
        ...

    async def read(self) -> Leader | None:
        """Who leads."""
        ...

    async def take(self, seen: Leader | None, *, holder: str, address: str) -> int | None:
        """Lead in place of `seen`."""
        ...

    async def renew(self, epoch: int) -> bool:
        """Say that who leads under `epoch` still does."""
        ...

    async def give_up(self, epoch: int) -> None:
        """Nobody leads."""
        ...


class Leadership:
    """One coordinator's part in it.

    Args:
        store: what all of them see.
        holder: who this one is. Another process with the same is its successor: the two are never
            alive at the same time.
        address: where it serves, for those who ask a follower.
        lease_s: of a leader.
    """

    def __init__(self, store: Store, *, holder: str, address: str, lease_s: float) -> None:
        self._store = store
        self._holder = holder
        self._address = address
        self._lease_s = lease_s
        self._trouble = ""

    async def campaign(self, follow: Callable[[str], None]) -> int:
        """Return once this one leads: its epoch. `follow` hears of each leader before, by address.

        A store that is away is waited for.
        """
        loop = asyncio.get_running_loop()
        seen: Leader | None = None
        # Since when every look has found the same: in a store that is away no lease can be renewed.
        since: float | None = None
        away = False
        while True:
            try:
                leader = await self._within_lease(self._store.read())
                if leader != seen:
                    follow(leader.address if leader and leader.holder else "")
                if leader != seen or since is None:
                    seen, since = leader, loop.time()
                if self._is_free(seen) or loop.time() - since >= self._lease_s:
                    epoch = await self._within_lease(
                        self._store.take(seen, holder=self._holder, address=self._address)
                    )
                    if epoch is not None:
                        return epoch
            except StoreUnavailable as error:
                if not away:
                    log.warning("who leads cannot be read: %s", error)
                since, away = None, True
            else:
                away = False
            await asyncio.sleep(min(_LOOK_S, self._lease_s / 4))

    def _is_free(self, leader: Leader | None) -> bool:
        return leader is None or leader.holder in {"", self._holder}

    async def keep(self, epoch: int, late: Callable[[bool], Awaitable[None]]) -> None:
        """Renew the lease until cancelled.

        `late` hears True when that has not worked for so long that others may lead soon, which
        does not end it: nobody has to be there. It hears False each time that it has worked.

        Raises:
            NotLeader: another one leads by now.
        """
        loop = asyncio.get_running_loop()
        renewed = loop.time()
        while True:
            await asyncio.sleep(self._lease_s / 3)
            watch = asyncio.create_task(self._watch(renewed, late))
            try:
                renewed = await self._renew(epoch)
                # What was answered after so long tells little of now.
                while loop.time() - renewed >= self._lease_s * _LATE_AFTER:
                    renewed = await self._renew(epoch)
            finally:
                watch.cancel()
                await asyncio.wait({watch})
            await late(False)  # noqa: FBT003 - the answer, and nothing beside it

    async def _watch(self, renewed: float, late: Callable[[bool], Awaitable[None]]) -> None:
        silent_s = asyncio.get_running_loop().time() - renewed
        await asyncio.sleep(self._lease_s * _LATE_AFTER - silent_s)
        log.warning(
            "the lease of %g s is not renewed in time, another coordinator may lead soon: %s",
            self._lease_s,
            self._trouble or "no answer yet",
        )
        await late(True)  # noqa: FBT003 - as above

    async def _renew(self, epoch: int) -> float:
        """When it was renewed: no later than others see it."""
        loop = asyncio.get_running_loop()
        began: dict[asyncio.Task[bool], float] = {}
        # Where another try has a way of its own, one that is not answered may have lost its way.
        patience_s = None if self._store.in_turn else self._lease_s / 6
        try:
            while True:
                began[asyncio.create_task(self._store.renew(epoch))] = loop.time()
                done, _ = await asyncio.wait(
                    began, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED
                )
                for attempt in sorted(done, key=began.__getitem__, reverse=True):
                    try:
                        if not attempt.result():
                            raise NotLeader("another coordinator leads by now")
                    except Deposed as error:
                        raise NotLeader(str(error)) from error
                    except StoreUnavailable as error:
                        self._trouble = str(error)
                        del began[attempt]
                    else:
                        self._trouble = ""
                        return began[attempt]
                if done:
                    await asyncio.sleep(self._lease_s / 12)
        finally:
            _leave(*began)

    async def _within_lease(self, asking: Coroutine[object, object, Answer]) -> Answer:
        """What is answered within the lease, not counting how long this process was busy itself.

        Raises:
            StoreUnavailable: nothing.
        """
        attempt = asyncio.create_task(asking)
        try:
            async with in_ticks(max(self._lease_s, TICK_S)):
                await asyncio.wait({attempt})
        except TimeoutError:
            raise StoreUnavailable("the database does not answer") from None
        finally:
            if not attempt.done():
                _leave(attempt)
        return attempt.result()

    async def give_up(self, epoch: int) -> None:
        """Have a successor take over at once."""
        try:
            await self._within_lease(self._store.give_up(epoch))
        except StoreUnavailable as error:
            log.warning("a successor has to wait for the lease to end: %s", error)


def _leave(*attempts: asyncio.Task[Answer]) -> None:
    """Cancel them, and do not wait for it: to cancel what hangs may hang."""
    for attempt in attempts:
        attempt.cancel()
        attempt.add_done_callback(lambda done: done.cancelled() or done.exception())
