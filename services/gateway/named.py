"""Policies behind the paths of checkpoints, for callers that name them anew with each request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cachetools import TTLCache

from rollmesh.errors import NotFound
from rollmesh.types import PolicyRef
from services.gateway.callers import Caller
from services.gateway.wire.paths import CheckpointPath

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh.types import Checkpoint
    from services.gateway.checkpoints import Checkpoints
    from services.gateway.documents import Fields
    from services.gateway.policies import Policies

BELIEVED_S = 5.0
"""How long a lease is believed to be there without asking."""
_KNOWN = 10_000

# A name may be given again, to other weights.
_Key = tuple[str, str]


class Named:
    """Finds them, and leases each while it is asked for. `clock`: seconds, monotonic."""

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
        # By name and digest. Who comes while it is looked for waits for the same.
        self._found: TTLCache[_Key, asyncio.Task[PolicyRef]] = TTLCache(
            _KNOWN, BELIEVED_S, timer=clock
        )
        self._held: TTLCache[_Key, Fields] = TTLCache(_KNOWN, lease_ttl_s, timer=clock)

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
        key = (checkpoint.name, checkpoint.digest)
        finding = self._found.get(key)
        if finding is None or _has_failed(finding):
            finding = asyncio.create_task(self._policy(caller, checkpoint, key))
            finding.add_done_callback(_has_failed)
            self._found[key] = finding
        # Whoever goes away leaves it to the others.
        return checkpoint.base_model, await asyncio.shield(finding)

    async def _policy(self, caller: Caller, checkpoint: Checkpoint, key: _Key) -> PolicyRef:
        held = self._held.get(key)
        if held is None or not await self._policies.is_held(held["lease"]):
            held = await self._policies.hold(caller, checkpoint, "")
        # As long from now on as the lease.
        self._held[key] = held
        return PolicyRef(adapter=held["adapter"], policy_version=held["version"])


def _has_failed(finding: asyncio.Task[PolicyRef]) -> bool:
    return finding.done() and (finding.cancelled() or finding.exception() is not None)
