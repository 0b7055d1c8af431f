"""Calls of one environment: each goes to a replica that takes work, and is tried again.

What says UNAVAILABLE is tried again, on another replica where there is one: reading and scoring
change nothing, and an episode has not begun before its first observation. What failed otherwise is
not: whether that is worth another rollout, its caller knows.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from rollmesh.errors import EnvironmentUnavailable, Overloaded
from rollmesh.telemetry import span

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from rollmesh.errors import MeshError
    from services.reward.environments.admission import Admission
    from services.reward.environments.config import EnvironmentConfig
    from services.reward.environments.ports import EnvironmentPort
    from services.reward.environments.replica import Replica
    from services.reward.environments.run import Kind, Run

T = TypeVar("T")

FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 1.0


class Calls:
    """Makes calls of an environment."""

    def __init__(self, config: EnvironmentConfig, admission: Admission) -> None:
        self._config = config
        self._admission = admission

    @contextlib.asynccontextmanager
    async def under_way(
        self,
        kind: Kind,
        ask: Callable[[EnvironmentPort, contextlib.AsyncExitStack], Awaitable[T]],
        within_s: float,
        *,
        refusals: tuple[type[MeshError], ...] = (),
        turn: contextlib.AbstractAsyncContextManager[object] | None = None,
    ) -> AsyncIterator[tuple[Run, T]]:
        """A call that holds its place until the block is left, and what `ask` was answered.

        `ask` gets `within_s` seconds; what it puts on the stack is left with the place. `refusals`:
        errors that are the caller's mistake. `turn`: held while the call waits for a place.

        Raises:
            EnvironmentUnavailable, EnvironmentTimeout, EnvironmentFailed: it fails.
            Overloaded: too many wait, or all replicas say so for patience_s.
            MeshError: one of `refusals`.
        """
        tries = _Tries(self._config)
        while True:
            async with contextlib.AsyncExitStack() as held:
                async with turn or contextlib.nullcontext():
                    run = await self._admission.enter(kind, avoid=tries.avoid, again=tries.again)
                held.enter_context(run)
                try:
                    with span("environment.call", environment=self._config.name, kind=kind.value):
                        answer = await run.asked(
                            partial(ask, run.port, held), within_s, refusals=refusals
                        )
                except (EnvironmentUnavailable, Overloaded) as error:
                    run.settle(error)
                    backoff_s = tries.failed(run, error)
                else:
                    yield run, answer
                    return
            await asyncio.sleep(backoff_s)


class _Tries:
    """How often one call has been tried, and how it went."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self.avoid: Replica | None = None
        self._config = config
        self._num_failed = 0
        self._refused_since: float | None = None

    @property
    def again(self) -> bool:
        """Whether it has been tried."""
        return self.avoid is not None

    def failed(self, run: Run, error: MeshError) -> float:
        """Seconds after which to try again.

        Raises:
            MeshError: `error`, where it has been tried enough.
        """
        self.avoid = run.replica
        if isinstance(error, Overloaded):
            # The replica gets nothing for a while: that is the backoff.
            now = asyncio.get_running_loop().time()
            if self._refused_since is None:
                self._refused_since = now
            if now - self._refused_since >= self._config.patience_s:
                raise error
            return 0.0
        self._num_failed += 1
        if self._num_failed >= self._config.attempts:
            raise error
        return min(FIRST_BACKOFF_S * 2.0 ** (self._num_failed - 1), LONGEST_BACKOFF_S)
