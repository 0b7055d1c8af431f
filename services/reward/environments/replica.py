"""One replica of an environment: whether it answers, what it says it is, and what runs there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from rollmesh.errors import (
    EnvironmentFailed,
    EnvironmentUnavailable,
    MeshError,
    NotFound,
    Unimplemented,
)
from rollmesh.ticks import in_ticks
from services.reward.environments.breaker import Breaker
from services.reward.environments.description import described
from services.reward.environments.run import Kind, Run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from rollmesh import chat
    from services.reward.environments.config import EnvironmentConfig
    from services.reward.environments.ports import Connection, EnvironmentPort

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.3
POLL_TIMEOUT_S = 1.0
"""One that stalls is out within 1.3 s: whoever polls us in turn must know it within 2 s."""
SUSPECT_PAUSE_S = 0.05
"""Before one that failed a call is polled: however many fail, it is not polled without pause."""
DESCRIBE_INTERVAL_S = 3.0
"""A server behind a fixed address may be exchanged for another without ever seeming away."""
DESCRIBE_TIMEOUT_S = 5.0
MOST_UNHEARD = 256
"""Calls begun at a replica and not heard of: neither answered nor followed by an answered poll.
Servers made of gRPC's core drop calls at random when more than 1,000 have come that they have not
begun to work on, and answer no poll in time while they have that many before it."""
LONGEST_FULL_S = 1.0
"""For which a replica that says RESOURCE_EXHAUSTED is left alone, whatever it says itself."""


class Replica:
    """A server at `place` (IP:port).

    Attributes:
        info: what it said of the environment, since it last came up; None: it is not up.
        refusal: why it takes no work although it is up: it is not like the others. Empty: it may.
        leaving: its name does not lead to it any more; what runs there goes on.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        place: str,
        connection: Connection,
        *,
        changed: Callable[[], None],
        freed: Callable[[], None],
    ) -> None:
        """`changed` is called when it comes or goes, `freed` when there is room again."""
        self.environment = config.name
        self.place = place
        self.info: chat.EnvironmentInfo | None = None
        self.refusal = ""
        self.leaving = False
        self.breaker = Breaker(config.breaker)
        self.full_until = 0.0
        self.last_begun = 0
        self._config = config
        self._connection = connection
        self._changed = changed
        self._freed = freed
        self._problem = "not heard of yet"
        self._tells_health = True
        self._silent_s = 0.0
        self._before_silence: chat.EnvironmentInfo | None = None
        self._num_answers = 0
        self._suspected = asyncio.Event()
        self._runs: set[Run] = set()
        self._unheard: set[Run] = set()
        self._num = dict.fromkeys(Kind, 0)

    @property
    def port(self) -> EnvironmentPort:
        """The environment there."""
        return self._connection.environment

    @property
    def up(self) -> bool:
        """Whether it answers, says that it serves, and has the environment."""
        return self.info is not None

    @property
    def silent(self) -> bool:
        """Whether its last poll got no answer."""
        return self._silent_s > 0

    @property
    def problem(self) -> str:
        """Why it takes no work; empty: it does."""
        return (self.refusal or self.breaker.problem) if self.up else self._problem

    @property
    def num_running(self) -> int:
        """Episodes and Score calls under way there."""
        return self._num[Kind.EPISODE] + self._num[Kind.SCORE]

    @property
    def num_episodes(self) -> int:
        """Episodes under way there."""
        return self._num[Kind.EPISODE]

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way there."""
        return not self._runs

    @property
    def max_episodes(self) -> int:
        """Episodes that it takes at once; 0: it has none."""
        if self.info is None or not self.info.has_episodes:
            return 0
        most = self.info.limits.max_concurrent_episodes or self._config.max_concurrent
        return min(most, self._config.max_concurrent)

    def takes_work(self, now: float) -> bool:
        """Whether it may be called, if there is room."""
        return self.up and not self.refusal and not self.leaving and self.breaker.allows(now)

    def has_room(self, kind: Kind, now: float) -> bool:
        """Whether it has room for one more such call."""
        return len(self._unheard) < MOST_UNHEARD and self.num_free(kind, now) > 0

    def num_free(self, kind: Kind, now: float) -> int:
        """Such calls for which it has room, though not all at once."""
        if now < self.full_until:
            return 0
        if kind is Kind.READ:
            return self._config.max_concurrent
        free = self._config.max_concurrent - self.num_running
        most = self.info.limits.max_concurrent_episodes if self.info else 0
        if kind is Kind.EPISODE and most:
            free = min(free, most - self.num_episodes)
        return max(free, 0)

    def begin(self, kind: Kind) -> Run:
        """Take a place there."""
        run = Run(self, kind, trial=self.breaker.begin())
        self._runs.add(run)
        self._unheard.add(run)
        self._num[kind] += 1
        return run

    def leave(self, run: Run) -> None:
        """Give the place back."""
        self._runs.discard(run)
        self._unheard.discard(run)
        self._num[run.kind] -= 1
        if not run.refused:
            # Whatever it had said, there is room now.
            self.full_until = 0.0
        self._freed()

    def is_full(self, retry_after_s: float) -> None:
        """It said RESOURCE_EXHAUSTED."""
        now = asyncio.get_running_loop().time()
        self.full_until = now + min(retry_after_s, LONGEST_FULL_S)

    def answered(self, run: Run) -> None:
        """A call was answered: whatever its health does, it has not stalled."""
        self._num_answers += 1
        if run in self._unheard:
            self._heard_of({run})
        if self._before_silence is not None:
            # It is the same server still: nothing has begun there since.
            self._in(self._before_silence)

    def suspect(self, problem: str) -> None:
        """A call failed: it is out until its next good poll, which comes soon."""
        self._out(problem)
        self._suspected.set()

    def break_off(self, error: Callable[[], MeshError]) -> None:
        """End all that runs there with `error`, made anew for each."""
        for run in list(self._runs):
            run.break_off(error())

    async def watch(self) -> None:
        """Poll it until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch_description())
                while True:
                    self._suspected.clear()
                    await self._poll()
                    await self._pause()
        finally:
            await self._connection.close()

    async def _poll(self) -> None:
        info, unheard = self.info, set(self._unheard)
        try:
            async with _answering(POLL_TIMEOUT_S, signs=self._signs):
                serves = await self._serves()
                if not self._tells_health:
                    info = await self._describe()
            self._silent_s = 0.0
            self._heard_of(unheard)
            if not serves:
                self._out("it says NOT_SERVING")
                return
            if info is None or self.info is None:
                async with _answering(DESCRIBE_TIMEOUT_S):
                    info = await self._describe()
        except _Silent as silent:
            stalled = self.info or self._before_silence
            self._is_silent(str(silent), POLL_TIMEOUT_S + POLL_INTERVAL_S)
            self._before_silence = stalled
        except EnvironmentFailed as error:  # It answers, and is not what it should be.
            self._out(str(error))
        except MeshError as error:
            self._is_silent(str(error), POLL_INTERVAL_S)
        else:
            self._in(info)

    def _signs(self) -> tuple[int, int]:
        """A server, or we, may have so much to do that a poll takes its time."""
        return self._num_answers, self._connection.health.num_answers

    async def _serves(self) -> bool:
        self._tells_health = True
        try:
            return await self._connection.health.check()
        except (NotFound, Unimplemented):
            self._tells_health = False
            return True

    async def _describe(self) -> chat.EnvironmentInfo:
        return described(await self.port.describe(), self._config.called)

    async def _watch_description(self) -> None:
        while True:
            await asyncio.sleep(DESCRIBE_INTERVAL_S)
            if not self.up or not self._tells_health:
                continue
            try:
                async with _answering(DESCRIBE_TIMEOUT_S):
                    info = await self._describe()
            except EnvironmentFailed as error:
                self._out(str(error))
            except (MeshError, _Silent):
                continue  # How it is, its health says.
            else:
                if self.up:
                    self._in(info)

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_INTERVAL_S):
                await self._suspected.wait()
                await asyncio.sleep(SUSPECT_PAUSE_S)

    def _heard_of(self, runs: set[Run]) -> None:
        was_full = len(self._unheard) >= MOST_UNHEARD
        self._unheard -= runs
        if was_full and runs:
            self._freed()

    def _in(self, info: chat.EnvironmentInfo) -> None:
        if info == self.info:
            return
        if self.info is None:
            log.info("environment %s: the replica at %s serves", self.environment, self.place)
        self.info = info
        self._silent_s = 0.0
        self._before_silence = None
        self._changed()

    def _out(self, problem: str) -> None:
        self._problem = problem
        self._before_silence = None
        if self.info is not None:
            log.warning(
                "environment %s: the replica at %s is out: %s",
                self.environment,
                self.place,
                problem,
            )
            self.info = None
            self._changed()

    def _is_silent(self, problem: str, for_s: float) -> None:
        """It did not answer a poll: what runs there waits for it, though not for ever.

        `for_s`: what the poll took, had we nothing else to do: a service that is busy itself must
        not lose patience with others.
        """
        self._out(problem)
        # Whatever answers next is as good as new.
        self.breaker.went_well()
        self._silent_s += for_s
        if self._silent_s >= self._config.patience_s:
            self.break_off(lambda: self._given_up(problem))

    def _given_up(self, problem: str) -> EnvironmentUnavailable:
        return EnvironmentUnavailable(
            f"environment {self.environment!r} at {self.place}: the replica is given up: {problem}",
            environment=self.environment,
            replica=self.place,
        )


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
