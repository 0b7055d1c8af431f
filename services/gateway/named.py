"""Policies behind the paths of checkpoints, for callers that name them anew with each request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachetools import TTLCache

from rollmesh.errors import NotFound
from rollmesh.types import PolicyRef
from services.gateway.callers import Caller
from services.gateway.wire.paths import CheckpointPath

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.gateway.checkpoints import Checkpoints
    from services.gateway.policies import Policies

_KNOWN = 10_000


class Named:
    """Finds them, and keeps each for a while. `clock`: seconds, monotonic."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        policies: Policies,
        clock: Callable[[], float],
        *,
        lease_ttl_s: float,
    ) -> None:
        self._checkpoints = checkpoints
        self._policies = policies
        # By the checkpoint's name, for as long as no other lease is needed.
        self._held: TTLCache[str, PolicyRef] = TTLCache(_KNOWN, lease_ttl_s / 2, timer=clock)

    async def policy(self, project: str, path: str) -> tuple[str, PolicyRef]:
        """The base model, and the version with the weights of a path, leased.

        Raises:
            NotFound: the project has no such checkpoint, or it is not for sampling.
            InvalidRequest: it is no path.
        """
        found = CheckpointPath.parse(path, field="model")
        if found.kind != "sampler_weights":
            raise NotFound(f"model: {path} is not for sampling", resource=path)
        caller = Caller(project, key="")
        checkpoint = await self._checkpoints.get(caller, found)
        policy = self._held.get(checkpoint.name)
        if policy is None:
            held = await self._policies.hold(caller, checkpoint, "")
            policy = PolicyRef(adapter=held["adapter"], policy_version=held["version"])
            self._held[checkpoint.name] = policy
        return checkpoint.base_model, policy
