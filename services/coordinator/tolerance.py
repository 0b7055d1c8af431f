"""How many failures of its environment a job puts up with.

An environment that is away is waited for, and that counts as nothing. One that fails at a rollout,
or takes too long over it, is asked again `max_retries` times, one that goes away in the middle of
it MAX_LOST times in all; then the rollout is given up, and its group with it. That counts as one,
over the whole life of the job.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rollmesh.errors import EnvironmentFailed, EnvironmentTimeout
from rollmesh.job import Warned

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from rollmesh.job import EnvironmentSpec
    from services.coordinator.retry import Patience

Result = TypeVar("Result")


MAX_LOST = 5
"""Times that a rollout may be lost in the middle. Replicas that are killed now and then, or one by
one when they are replaced, take the same rollout hardly ever twice; one whose own action kills the
environment kills it for everybody else each time."""
MAX_LOST_BESIDE_OTHERS = 2
"""Once it was lost so often a rollout plays on its own among those of the job for which that holds:
one of them may be to blame, and the others are not to be lost with it for ever."""


class RolloutLost(Exception):
    """The environment went away when the rollout had begun."""


class GaveUp(Exception):
    """A rollout was given up; the message says why."""


class Tolerance:
    """Of one job.

    Args:
        spec: what it puts up with.
        patience: waits while the environment or the reward service is away.
        warn: records an event.
        memory: what an interrupted loop remembered.
    """

    def __init__(
        self,
        spec: EnvironmentSpec,
        *,
        patience: Patience,
        warn: Callable[[Warned], Awaitable[None]],
        memory: Mapping[str, Any],
    ) -> None:
        self._spec = spec
        self._patience = patience
        self._warn = warn
        self._num_given_up: int = memory.get("num_given_up", 0)
        self._alone = asyncio.Lock()

    @property
    def memory(self) -> dict[str, Any]:
        """JSON."""
        return {"num_given_up": self._num_given_up}

    @property
    def num_given_up(self) -> int:
        """Rollouts, since the job began: of a group one."""
        return self._num_given_up

    async def call(self, what: str, attempt: Callable[[int], Awaitable[Result]]) -> Result:
        """What `attempt` answers, which hears how many before it failed; `what` names it to people.

        Raises:
            GaveUp: it failed at each attempt, or was lost too often; `group` counts it.
            MeshError: any other that `attempt` raises.
        """
        num_failed = num_lost = 0
        while True:
            alone = self._alone if num_lost >= MAX_LOST_BESIDE_OTHERS else contextlib.nullcontext()
            try:
                async with alone:
                    return await self.patient(partial(attempt, num_failed + num_lost))
            except (EnvironmentFailed, EnvironmentTimeout) as failure:
                num_failed += 1
                if num_failed > self._spec.max_retries:
                    often = f"{num_failed} times" if num_failed > 1 else "once"
                    raise GaveUp(f"{what} was tried {often} and is given up: {failure}") from None
            except RolloutLost as loss:
                num_lost += 1
                if num_lost == MAX_LOST:
                    raise GaveUp(
                        f"{what} was lost {num_lost} times after it had begun and is given up: "
                        f"{loss}"
                    ) from None

    async def patient(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """What `attempt` answers, once everybody who has to do with it is there.

        Raises:
            MeshError: as `attempt`; a failure of the environment counts as nothing here.
        """
        return await self._patience.call(attempt)

    async def group(
        self, rollouts: Iterable[Callable[[], Awaitable[Result]]]
    ) -> list[Result] | None:
        """What all `rollouts` come to; None: one was given up, and the others with it.

        Raises:
            EnvironmentFailed: the job puts up with no more.
            MeshError: any other that one of them raises.
        """
        given_up: list[GaveUp] = []

        async def played(rollout: Callable[[], Awaitable[Result]]) -> Result | None:
            try:
                return await rollout()
            except GaveUp as failure:
                given_up.append(failure)
                for other in made:
                    if other is not asyncio.current_task():
                        other.cancel()
                return None

        async with asyncio.TaskGroup() as tasks:
            made = [tasks.create_task(played(rollout)) for rollout in rollouts]
        if given_up:
            await self._count(str(given_up[0]))
            return None
        return [cast("Result", each.result()) for each in made]

    async def _count(self, told: str) -> None:
        self._num_given_up += 1
        if self._num_given_up > self._spec.max_failures:
            raise EnvironmentFailed(
                f"environment.max_failures is {self._spec.max_failures}, and this is one more: "
                f"{told}",
                environment=self._spec.name,
                allowed=self._spec.max_failures,
            )
        await self._warn(Warned(reason="ENVIRONMENT_FAILED", message=told))
