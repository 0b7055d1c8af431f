"""Which version a checkpoint is sampled as, and holds on versions that sampling sessions need."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from typing import TYPE_CHECKING

from cachetools import TTLCache

from rollmesh.errors import AlreadyExists, MeshError, NotFound
from rollmesh.names import parse_checkpoint
from rollmesh.types import PolicyRef

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rollmesh.types import Checkpoint, Lease
    from services.gateway.callers import Caller
    from services.gateway.documents import Document, Fields
    from services.gateway.ports import Mesh

_FORK_ATTEMPTS = 3
_RENEWALS_AT_ONCE = 16
_KNOWN = 10_000


class Policies:
    """Holds versions. `clock`: seconds, monotonic; `new_id`: hexadecimal digits, never the same."""

    def __init__(
        self,
        mesh: Mesh,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        *,
        lease_ttl_s: float,
        idle_ttl_s: float,
    ) -> None:
        self._mesh = mesh
        self._new_id = new_id
        self._lease_ttl_s = lease_ttl_s
        self._idle_ttl_s = idle_ttl_s
        # What this gateway renewed lately: each renews for itself, which costs little.
        self._renewed: TTLCache[str, bool] = TTLCache(_KNOWN, lease_ttl_s / 3, timer=clock)

    async def hold(self, caller: Caller, checkpoint: Checkpoint, request_id: str) -> Fields:
        """A lease on a version that has exactly the weights of `checkpoint`.

        The adapter's own where it is still kept, else that of a fork.
        """
        project, adapter, _ = parse_checkpoint(checkpoint.name)
        own = PolicyRef(
            adapter=f"projects/{project}/adapters/{adapter}",
            policy_version=checkpoint.policy_version,
        )
        try:
            lease = await self._lease(caller, own, request_id)
        except NotFound:
            return _held(await self._forked(caller, checkpoint, request_id))
        # An adapter that was deleted and made anew counts its versions anew.
        if lease.digest != checkpoint.digest:
            return _held(await self._forked(caller, checkpoint, request_id))
        return _held(lease)

    async def hold_again(self, caller: Caller, document: Document) -> Fields:
        """A lease on the version of a sampling session that has none; nothing: it is gone."""
        policy = PolicyRef(
            adapter=document.fields["adapter"], policy_version=document.fields["version"]
        )
        try:
            lease = await self._lease(caller, policy, "")
        except NotFound:
            return {}
        # Of an adapter that was deleted and made anew.
        return {"lease": lease.name} if lease.digest == document.fields["digest"] else {}

    async def is_held(self, lease: str) -> bool:
        """Whether a lease is still there; if it is, it lasts again. Empty: none."""
        if not lease:
            return False
        try:
            await self._mesh.leases.renew_lease(lease, ttl_s=self._lease_ttl_s)
        except NotFound:
            return False
        return True

    async def renew(self, documents: list[Document]) -> None:
        """Make the leases of these sampling sessions last, where it is time to."""
        leases = [document.fields.get("lease") for document in documents]
        await _each(self._renew, [lease for lease in leases if lease and self._is_due(lease)])

    async def keep_models(self, adapters: list[str]) -> None:
        """Have models last as if they had been used; those that are gone are gone."""

        async def keep(adapter: str) -> None:
            with contextlib.suppress(NotFound):
                await self._mesh.adapters.keep_idle(adapter, self._idle_ttl_s)

        await _each(keep, adapters)

    def is_due(self, session: str) -> bool:
        """Whether the leases of a session were last looked at a while ago."""
        return self._is_due(f"session {session}")

    def forget(self, session: str) -> None:
        """They could not be looked at."""
        self._renewed.pop(f"session {session}", None)

    async def release(self, lease: str) -> None:
        """Let go of a version; one that is let go of is fine."""
        await self._mesh.leases.delete_lease(lease)

    def _is_due(self, what: str) -> bool:
        """Whether it is time; if it is, the next time begins now."""
        if what in self._renewed:
            return False
        self._renewed[what] = True
        return True

    async def _renew(self, lease: str) -> None:
        try:
            await self._mesh.leases.renew_lease(lease, ttl_s=self._lease_ttl_s)
        except NotFound:
            return  # Whoever samples from it learns so.
        except MeshError:
            self._renewed.pop(lease, None)

    async def _forked(self, caller: Caller, checkpoint: Checkpoint, request_id: str) -> Lease:
        """A lease on the weights of a checkpoint as an adapter of their own."""
        if request_id:
            request_id += "-fork"
        for attempt in range(_FORK_ATTEMPTS):
            # The same names for all, so that all share a fork, also one that is made anew after an
            # idle one has gone: a remembered request would only say that it has.
            told = f"{checkpoint.name} {checkpoint.create_time} {attempt}"
            fork = caller.adapter(f"f-{hashlib.sha256(told.encode()).hexdigest()[:40]}")
            with contextlib.suppress(AlreadyExists):
                await self._mesh.adapters.fork(
                    fork, checkpoint.name, self._new_id(), idle_ttl_s=self._idle_ttl_s
                )
            # Not found: it has gone since, or what this request leased before has.
            with contextlib.suppress(NotFound):
                version = await self._mesh.adapters.publish(fork)
                policy = PolicyRef(adapter=fork, policy_version=version.policy_version)
                # Other weights: somebody has trained it.
                if version.digest == checkpoint.digest:
                    return await self._lease(caller, policy, request_id)
            request_id = ""
        raise NotFound(f"{checkpoint.name} is gone", resource=checkpoint.name)

    async def _lease(self, caller: Caller, policy: PolicyRef, request_id: str) -> Lease:
        return await self._mesh.leases.create_lease(
            caller.project, policy, ttl_s=self._lease_ttl_s, request_id=request_id
        )


async def _each(work: Callable[[str], Awaitable[None]], names: list[str]) -> None:
    """Do `work` for all of `names`, a few at a time."""
    gate = asyncio.Semaphore(_RENEWALS_AT_ONCE)

    async def one(name: str) -> None:
        async with gate:
            await work(name)

    await asyncio.gather(*map(one, names))


def _held(lease: Lease) -> Fields:
    """What a sampling session's document says of a lease."""
    return {
        "adapter": lease.adapter,
        "version": lease.policy_version,
        "digest": lease.digest,
        "lease": lease.name,
    }
