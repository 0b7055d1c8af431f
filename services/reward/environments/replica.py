"""One replica of an environment: how it is, and whether it takes work."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rollmesh.errors import EnvironmentUnavailable
from services.reward.environments.breaker import Breaker
from services.reward.environments.room import Room
from services.reward.environments.run import Kind, Run
from services.reward.environments.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh import chat
    from services.reward.environments.config import EnvironmentConfig
    from services.reward.environments.ports import Connection

log = logging.getLogger(__name__)


class Replica:
    """A server at `place` (IP:port). `watch` tells it how it is, and so do its calls.

    Attributes:
        environment: name of the environment, as jobs call it.
        port: the environment there.
        room: what is under way there.
        breaker: whether calls went well.
        info: what it said of the environment, since it last came; None: it is not up.
        refusal: why it takes no work although it is up: it is not like the others. Empty: it may.
        leaving: its name does not lead to it any more; what runs there goes on.
        last_begun: number of the call that began there last.
        num_answers: calls of which something was heard.
        suspected: set when a call failed, for it to be polled soon.
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
        self.port = connection.environment
        self.room = Room(config.max_concurrent, freed=freed)
        self.breaker = Breaker(config.breaker)
        self.info: chat.EnvironmentInfo | None = None
        self.refusal = ""
        self.leaving = False
        self.last_begun = 0
        self.num_answers = 0
        self.suspected = asyncio.Event()
        self._config = config
        self._watch = Watch(self, connection, config.called)
        self._changed = changed
        self._problem = "not heard of yet"
        self._silent_s = 0.0
        self._before_stall: chat.EnvironmentInfo | None = None

    async def watch(self) -> None:
        """Poll it until cancelled."""
        await self._watch.run()

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
    def max_episodes(self) -> int:
        """Episodes that it takes at once; 0: it has none."""
        if self.info is None or not self.info.has_episodes:
            return 0
        most = self.info.limits.max_concurrent_episodes or self._config.max_concurrent
        return min(most, self._config.max_concurrent)

    def takes_work(self, now: float) -> bool:
        """Whether it may be called, if there is room."""
        return self.up and not self.refusal and not self.leaving and self.breaker.allows(now)

    def begin(self, kind: Kind) -> Run:
        """Take a place there."""
        run = Run(self, kind, trial=self.breaker.begin())
        self.room.enter(run)
        return run

    def answered(self, run: Run) -> None:
        """A call was answered: whatever its health does, it has not stalled."""
        self.num_answers += 1
        self.room.heard_of({run})
        if self._before_stall is not None:
            # It is the same server still: nothing has begun there since.
            self.come(self._before_stall)

    def suspect(self, problem: str) -> None:
        """A call failed: it is out until its next good poll, which comes soon."""
        self._out(problem)
        self.suspected.set()

    def come(self, info: chat.EnvironmentInfo) -> None:
        """It serves, and is `info`."""
        self._silent_s, self._before_stall = 0.0, None
        if info == self.info:
            return
        if self.info is None:
            log.info("environment %s: the replica at %s serves", self.environment, self.place)
        self.info = info
        self.room.max_episodes = info.limits.max_concurrent_episodes
        self._changed()

    def go(self, problem: str) -> None:
        """It answers that it takes no work; what it has it goes on with."""
        self._silent_s = 0.0
        self._out(problem)

    def stall(self, problem: str, for_s: float) -> None:
        """It does not answer, though it seems to be there; see `lose`."""
        info = self.info or self._before_stall
        self.lose(problem, for_s)
        self._before_stall = info

    def lose(self, problem: str, for_s: float) -> None:
        """A poll did not reach it: what runs there waits for it, though not for ever.

        `for_s`: what the poll took, had we nothing else to do: a service that is busy itself must
        not lose patience with others.
        """
        self._out(problem)
        # Whatever answers next is as good as new.
        self.breaker.went_well()
        self._silent_s += for_s
        if self._silent_s >= self._config.patience_s:
            self.room.break_off(lambda: self._given_up(problem))

    def _out(self, problem: str) -> None:
        self._problem, self._before_stall = problem, None
        if self.info is not None:
            log.warning(
                "environment %s: the replica at %s is out: %s",
                self.environment,
                self.place,
                problem,
            )
            self.info = None
            self._changed()

    def _given_up(self, problem: str) -> EnvironmentUnavailable:
        return EnvironmentUnavailable(
            f"environment {self.environment!r} at {self.place}: the replica is given up: {problem}",
            environment=self.environment,
            replica=self.place,
        )
