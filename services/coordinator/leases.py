"""Leases on versions: what keeps one for a client that goes on sampling it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh.errors import InvalidRequest, NotFound
from rollmesh.names import lease_name, parse_adapter, parse_lease, parse_project
from services.coordinator.store import Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh import types
    from services.coordinator.ports import Training
    from services.coordinator.store import LeaseStore

DEFAULT_TTL_S = 300.0
MAX_TTL_S = 3600.0


class Leases:
    """The leases of all projects.

    Args:
        store: where they are written down.
        training: knows the policies.
        max_leases: of one project at once.
        clock: Unix seconds.
        new_id: an id that no lease had before.
    """

    def __init__(
        self,
        store: LeaseStore,
        training: Training,
        *,
        max_leases: int,
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self._store = store
        self._training = training
        self._max_leases = max_leases
        self._clock = clock
        self._new_id = new_id

    async def create(
        self, parent: str, policy: types.PolicyRef, *, ttl_s: float | None, request_id: str
    ) -> types.Lease:
        """Keep a version (without one: the newest) of an adapter of the project `parent`.

        The same request_id ("": none) answers the same lease.

        Raises:
            InvalidRequest: no adapter, another base model than the adapter's, or `ttl_s`.
            NotFound: no such adapter in the project, or version that is kept; or the lease that the
                request made is gone.
            AlreadyExists: the request_id is taken.
            Overloaded: the project has as many as it may.
        """
        project = parse_project(parent, field="project")
        ttl_s = _check_ttl(ttl_s)
        if not policy.adapter:
            raise InvalidRequest(
                "policy.adapter: a lease is on a version of an adapter, and none is named",
                field="policy.adapter",
                value="",
                allowed=f"{parent}/adapters/{{adapter}}",
            )
        owner, _ = parse_adapter(policy.adapter, field="policy.adapter")
        if owner != project:
            # The same answer whether it exists or not: projects cannot see each other.
            raise NotFound(f"there is no {policy.adapter}", resource=policy.adapter)
        request = None
        if request_id:
            content = [policy.adapter, policy.base_model, policy.policy_version, ttl_s]
            request = Request.of(project, request_id, "CreateLease", *content)
        await self._training.resolve(policy)
        now = self._clock()
        return await self._store.create(
            lease_name(project, self._new_id()),
            policy.adapter,
            policy.policy_version,
            expire_time=now + ttl_s,
            max_leases=self._max_leases,
            request=request,
            now=now,
        )

    async def renew(self, name: str, *, ttl_s: float | None) -> types.Lease:
        """Let a lease end in `ttl_s`.

        Raises:
            InvalidRequest: the name, or `ttl_s`.
            NotFound: it has expired, or was deleted.
        """
        parse_lease(name)
        ttl_s = _check_ttl(ttl_s)
        now = self._clock()
        return await self._store.renew(name, expire_time=now + ttl_s, now=now)

    async def delete(self, name: str) -> None:
        """End a lease; one that is gone is fine. InvalidRequest: the name."""
        parse_lease(name)
        await self._store.delete(name, now=self._clock())


def _check_ttl(seconds: float | None) -> float:
    if seconds is None:
        return DEFAULT_TTL_S
    if not 0 < seconds <= MAX_TTL_S:
        raise InvalidRequest(
            f"ttl: {seconds:g} s is not over 0 and at most an hour",
            field="ttl",
            value=seconds,
            allowed=f"over 0 s, at most {MAX_TTL_S:g} s",
        )
    return seconds
