"""One call under way at a replica."""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING, Self, TypeVar

from rollmesh.errors import EnvironmentTimeout, EnvironmentUnavailable, MeshError, Overloaded
from services.reward.environments.failures import ITS_OWN, told

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from services.reward.environments.ports import EnvironmentPort
    from services.reward.environments.replica import Replica

T = TypeVar("T")


class Kind(enum.Enum):
    """What a call takes of a replica: a place for an episode, one for scoring, or none."""

    EPISODE = "episode"
    SCORE = "score"
    READ = "read"


class StreamOver(Exception):
    """The environment has ended an episode that waited for its caller."""


class Run:
    """A call that holds its place at `replica` until the block is left.

    No task and, while an episode waits for its caller, no timer belongs to it: what ends it from
    outside expires the time limit of whatever it waits for.

    Attributes:
        refused: the replica had no room for it after all.
    """

    __slots__ = (
        *("_broken", "_idle", "_is_over", "_limit", "_settled", "_trial"),
        *("kind", "refused", "replica"),
    )

    def __init__(self, replica: Replica, kind: Kind, *, trial: bool) -> None:
        self.replica = replica
        self.kind = kind
        self.refused = False
        self._trial = trial
        self._limit: asyncio.Timeout | None = None
        self._broken: MeshError | None = None
        self._idle = False
        self._is_over = False
        self._settled = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.settle(error)
        self.replica.room.leave(self)

    def give_back(self) -> None:
        """Nothing was called after all."""
        self.settle(asyncio.CancelledError())
        self.replica.room.leave(self)

    @property
    def port(self) -> EnvironmentPort:
        """The environment there."""
        return self.replica.port

    async def asked(
        self,
        ask: Callable[[], Awaitable[T]],
        within_s: float,
        *,
        refusals: tuple[type[MeshError], ...] = (),
    ) -> T:
        """What the environment answers, in `within_s` seconds.

        Raises:
            EnvironmentTimeout: it does not, though the replica is well.
            EnvironmentUnavailable, EnvironmentFailed, Overloaded: it fails.
            MeshError: one of `refusals`; or what the call was broken off with.
        """
        try:
            answer = await self._limited(ask, within_s)
        except TimeoutError:
            raise self._broken or self._late(within_s) from None
        except MeshError as error:
            if error is self._broken:
                raise
            found = told(
                error,
                environment=self.replica.environment,
                place=self.replica.place,
                refusals=refusals,
            )
            if isinstance(found, EnvironmentUnavailable):
                self.replica.suspect(str(error))
            if isinstance(found, Overloaded):
                self.refused = True
                now = asyncio.get_running_loop().time()
                self.replica.room.refuse_until(now, found.retry_after_s)
            raise found from error
        self.replica.answered(self)
        if self._trial:
            self.settle(None)
            self._settled, self._trial = False, False
        return answer

    async def idle(self, wait: Callable[[], Awaitable[T]]) -> T:
        """What the caller does next; the environment has nothing to do meanwhile.

        Raises:
            StreamOver: it has ended the stream nevertheless.
            MeshError: what the call was broken off with, or `wait` raises.
        """
        if self._is_over:
            raise StreamOver
        self._idle = True
        try:
            return await self._limited(wait, None)
        except TimeoutError:
            raise self._broken or StreamOver from None
        finally:
            self._idle = False

    async def caller(self, take: Callable[[], Awaitable[T]]) -> T:
        """What comes of telling the caller something, whatever the environment does meanwhile.

        Raises:
            MeshError: what the call was broken off with.
        """
        try:
            return await self._limited(take, None)
        except TimeoutError:
            assert self._broken is not None  # noqa: S101 - nothing else ends a wait without limit
            raise self._broken from None

    def ended(self) -> None:
        """The stream is over."""
        self._is_over = True
        if self._idle:
            self._interrupt()

    def break_off(self, error: MeshError) -> None:
        """Raise `error` where the call waits for something, now or next."""
        if self._broken is None:
            self._broken = error
            self._interrupt()

    def settle(self, error: BaseException | None) -> None:
        """What the call says of the replica: the first word counts."""
        if self._settled:
            return
        self._settled = True
        if error is None and self.kind is not Kind.READ:
            self.replica.breaker.went_well()
        elif isinstance(error, ITS_OWN):
            now = asyncio.get_running_loop().time()
            self.replica.breaker.failed(str(error), now, trial=self._trial)
        else:
            self.replica.breaker.abandoned(trial=self._trial)

    async def _limited(self, work: Callable[[], Awaitable[T]], seconds: float | None) -> T:
        if self._broken is not None:
            raise self._broken
        async with asyncio.timeout(seconds) as limit:
            self._limit = limit
            try:
                return await work()
            finally:
                self._limit = None

    def _interrupt(self) -> None:
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(asyncio.get_running_loop().time())

    def _late(self, within_s: float) -> MeshError:
        replica = self.replica
        message = (
            f"environment {replica.environment!r} at {replica.place}: no answer in {within_s:g} s"
        )
        context = {"environment": replica.environment, "replica": replica.place}
        if replica.silent:
            return EnvironmentUnavailable(f"{message}; the replica: {replica.problem}", **context)
        return EnvironmentTimeout(message, **context)
