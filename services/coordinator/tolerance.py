"""How many failures of its environment a job puts up with.

An environment that is away is waited for, and that counts as nothing. One that fails at a rollout,
or takes too long over it, is asked again `max_retries` times; then the rollout is given up, and
counted over the whole life of the job.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from rollmesh.errors import EnvironmentFailed, EnvironmentTimeout
from rollmesh.job import Warned

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from rollmesh.job import EnvironmentSpec
    from services.coordinator.retry import Patience

Result = TypeVar("Result")


class GaveUp(Exception):
    """A rollout was given up, and has been counted."""


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

    @property
    def memory(self) -> dict[str, Any]:
        """JSON."""
        return {"num_given_up": self._num_given_up}

    @property
    def num_given_up(self) -> int:
        """Rollouts, since the job began."""
        return self._num_given_up

    async def call(self, what: str, attempt: Callable[[int], Awaitable[Result]]) -> Result:
        """What `attempt` answers, which hears how many before it failed; `what` names it to people.

        Raises:
            GaveUp: it failed at each attempt.
            EnvironmentFailed: the job puts up with no more.
            MeshError: any other that `attempt` raises.
        """
        for number in range(self._spec.max_retries + 1):
            try:
                return await self.patient(partial(attempt, number))
            except (EnvironmentFailed, EnvironmentTimeout) as error:
                failure = error
        await self._give_up(what, failure)
        raise GaveUp(what)

    async def patient(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """What `attempt` answers, once everybody who has to do with it is there.

        Raises:
            MeshError: as `attempt`; a failure of the environment counts as nothing here.
        """
        return await self._patience.call(attempt)

    async def _give_up(self, what: str, failure: EnvironmentFailed | EnvironmentTimeout) -> None:
        self._num_given_up += 1
        often = f"{self._spec.max_retries + 1} times" if self._spec.max_retries else "once"
        told = f"{what} was tried {often} and is given up: {failure}"
        if self._num_given_up > self._spec.max_failures:
            raise EnvironmentFailed(
                f"environment.max_failures is {self._spec.max_failures}, and this is one more: "
                f"{told}",
                environment=self._spec.name,
                allowed=self._spec.max_failures,
            )
        await self._warn(Warned(reason="ENVIRONMENT_FAILED", message=told))
