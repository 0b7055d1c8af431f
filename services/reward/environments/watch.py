"""Polls one replica: whether it answers, whether it serves, and what it says it is."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from rollmesh.errors import EnvironmentFailed, MeshError, NotFound, Unimplemented
from rollmesh.ticks import in_ticks
from services.reward.environments.description import described

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from rollmesh import chat
    from services.reward.environments.ports import Connection
    from services.reward.environments.replica import Replica

POLL_INTERVAL_S = 0.3
POLL_TIMEOUT_S = 1.0
"""One that stalls is out within 1.3 s: whoever polls us in turn must know it within 2 s."""
SUSPECT_PAUSE_S = 0.05
"""Before one that failed a call is polled: however many fail, it is not polled without pause."""
DESCRIBE_INTERVAL_S = 3.0
"""A server behind a fixed address may be exchanged for another without ever seeming away."""
DESCRIBE_TIMEOUT_S = 5.0


class Watch:
    """Tells `replica` what its polls came to. `called`: what its server calls the environment."""

    def __init__(self, replica: Replica, connection: Connection, called: str) -> None:
        self._replica = replica
        self._connection = connection
        self._called = called
        self._tells_health = True

    async def run(self) -> None:
        """Poll until cancelled; then the connection is closed."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch_description())
                while True:
                    self._replica.suspected.clear()
                    await self._poll()
                    await self._pause()
        finally:
            await self._connection.close()

    async def _poll(self) -> None:
        replica, unheard = self._replica, self._replica.room.unheard()
        info = replica.info
        try:
            async with _answering(POLL_TIMEOUT_S, signs=self._signs):
                serves = await self._serves()
                if not self._tells_health:
                    info = await self._describe()
            replica.room.heard_of(unheard)
            if not serves:
                replica.go("it says NOT_SERVING")
                return
            if info is None or replica.info is None:
                async with _answering(DESCRIBE_TIMEOUT_S):
                    info = await self._describe()
        except _Silent as silent:
            replica.stall(str(silent), POLL_TIMEOUT_S + POLL_INTERVAL_S)
        except EnvironmentFailed as error:  # It answers, and is not what it should be.
            replica.go(str(error))
        except MeshError as error:
            replica.lose(str(error), POLL_INTERVAL_S)
        else:
            replica.come(info)

    def _signs(self) -> tuple[int, int]:
        """A server, or we, may have so much to do that a poll takes its time."""
        return self._replica.num_answers, self._connection.health.num_answers

    async def _serves(self) -> bool:
        self._tells_health = True
        try:
            return await self._connection.health.check()
        except (NotFound, Unimplemented):
            self._tells_health = False
            return True

    async def _describe(self) -> chat.EnvironmentInfo:
        return described(await self._connection.environment.describe(), self._called)

    async def _watch_description(self) -> None:
        while True:
            await asyncio.sleep(DESCRIBE_INTERVAL_S)
            if not self._replica.up or not self._tells_health:
                continue
            try:
                async with _answering(DESCRIBE_TIMEOUT_S):
                    info = await self._describe()
            except EnvironmentFailed as error:
                self._replica.go(str(error))
            except (MeshError, _Silent):
                continue  # How it is, its health says.
            else:
                if self._replica.up:
                    self._replica.come(info)

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_INTERVAL_S):
                await self._replica.suspected.wait()
                await asyncio.sleep(SUSPECT_PAUSE_S)


class _Silent(Exception):
    """No answer came; the message says in which time."""


@contextlib.asynccontextmanager
async def _answering(
    within_s: float, *, signs: Callable[[], object] = lambda: None
) -> AsyncIterator[None]:
    try:
        async with in_ticks(within_s, signs=signs):
            yield
    except TimeoutError:
        raise _Silent(f"no answer within {within_s:g} s") from None
