"""Sweeps as their users see them, and what compares their jobs while they run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from typing import TYPE_CHECKING

from rollmesh.errors import InvalidRequest
from rollmesh.names import check_id, parse_project, parse_sweep, sweep_name
from rollmesh.sweep import expand
from services.coordinator.paging import page_size_of
from services.coordinator.store import QUEUE, Request, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from rollmesh.job import JobSpec
    from rollmesh.sweep import Sweep, SweepSpec, Variant
    from services.coordinator.jobs import Jobs
    from services.coordinator.store import Changes, NewJob, SweepStore

log = logging.getLogger(__name__)

MAX_BYTES = 64 * 2**20
"""Of the specs of one sweep's jobs: each job keeps its own tasks."""
_MAX_ID = 58
_CHECKED_WITH_TASKS = ("base_model", "dataset", "prompt", "reward", "evaluation", "sft", "seed")
_POLL_S = 1.0


class Sweeps:
    """Sweeps of all projects.

    Args:
        store: where they are kept.
        jobs: checks the jobs that come of them.
        max_pending: jobs that may wait at once, over all projects.
        clock: Unix seconds.
        new_id: makes up an id for a sweep that was given none.
    """

    def __init__(
        self,
        store: SweepStore,
        jobs: Jobs,
        *,
        max_pending: int,
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._max_pending = max_pending
        self._clock = clock
        self._new_id = new_id
        # One creation at a time: each may have MAX_BYTES in memory, and finds room that no other
        # is about to take.
        self._creating = asyncio.Lock()

    async def create(
        self, parent: str, sweep_id: str, spec: SweepSpec, *, request_id: str
    ) -> Sweep:
        """Check and store a sweep and its jobs.

        Raises:
            InvalidRequest: the parameter, or the key of a job's spec, is the field.
            NotFound: nobody serves the base model.
            AlreadyExists: the id, a job's, an adapter's or the request_id is taken.
            Overloaded: too many jobs would wait.
            CapacityExhausted: halving would wait for adapters that may never be there together.
            Unavailable: the mesh is still starting, or the reward service is away.
        """
        project = parse_project(parent)
        if sweep_id:
            _check_id(sweep_id)
        request = await asyncio.to_thread(_request, project, request_id, sweep_id, spec)
        async with self._creating:
            return await self._create(project, sweep_id, spec, request)

    async def _create(
        self, project: str, sweep_id: str, spec: SweepSpec, request: Request
    ) -> Sweep:
        made = await self._store.find_request(request)
        if made is not None:
            return await self._store.get(made)
        sweep_id = sweep_id or self._new_id()
        variants = await asyncio.to_thread(expand, spec)
        if spec.halving is not None:
            wanted = Counter(one.spec.base_model for one in variants)
            self._jobs.check_room(project, wanted, await self._store.comparing())
        new_jobs = await self._prepare(project, sweep_id, variants)
        return await self._store.create(
            sweep_name(project, sweep_id),
            project,
            spec,
            new_jobs,
            request=request,
            max_pending=self._max_pending,
            now=self._clock(),
        )

    async def get(self, name: str) -> Sweep:
        """One sweep with its jobs, the best first."""
        parse_sweep(name)
        return await self._store.get(name)

    async def page(self, parent: str, page_size: int, page_token: str) -> tuple[list[Sweep], str]:
        """Sweeps of a project, newest first, and the token of the next page ("": none)."""
        project = parse_project(parent)
        size = page_size_of(page_size)
        found = await self._store.page(project, limit=size + 1, after=page_token)
        more = len(found) > size
        return found[:size], parse_sweep(found[size - 1].name)[1] if more else ""

    async def cancel(self, name: str) -> Sweep:
        """Cancel all of its jobs that have not ended."""
        parse_sweep(name)
        return await self._store.cancel(name, now=self._clock())

    async def _prepare(
        self, project: str, sweep_id: str, variants: list[Variant]
    ) -> list[tuple[Mapping[str, Any], NewJob]]:
        prepared: list[tuple[Mapping[str, Any], NewJob]] = []
        checked: list[JobSpec] = []
        size = 0
        for number, variant in enumerate(variants):
            spec = variant.spec
            new = await self._jobs.prepare(
                project,
                f"{sweep_id}-{number}",
                spec,
                tasks_are_checked=any(_has_tasks_of(spec, other) for other in checked),
            )
            checked.append(spec)
            prepared.append((variant.values, new))
            size += await asyncio.to_thread(_size, new.full)
            if size > MAX_BYTES:
                raise InvalidRequest(
                    f"base.dataset: {len(variants)} jobs, which each keep their tasks, come to "
                    f"more than {MAX_BYTES // 2**20} MiB; a generator takes no room",
                    field="base.dataset",
                )
        return prepared


def _request(project: str, request_id: str, sweep_id: str, spec: SweepSpec) -> Request:
    return Request.of(project, request_id, "CreateSweep", sweep_id, spec.model_dump(mode="json"))


def _size(text: str) -> int:
    return len(text.encode())


def _check_id(sweep_id: str) -> None:
    check_id(sweep_id, field="sweep_id")
    if len(sweep_id) > _MAX_ID:
        raise InvalidRequest(
            f"sweep_id: {len(sweep_id)} characters are too many: its jobs are named "
            "{sweep_id}-{number}",
            field="sweep_id",
            value=sweep_id,
            allowed=f"1 to {_MAX_ID} characters",
        )


def _has_tasks_of(spec: JobSpec, other: JobSpec) -> bool:
    """Whether what _check_tasks looks at is the same. Quick: variants share what is not varied."""
    return all(getattr(spec, key) == getattr(other, key) for key in _CHECKED_WITH_TASKS)


class Halver:
    """Compares the jobs of sweeps that are due for it, and does what comes of it.

    All state is in the store, and each comparison is one transaction there: whoever looks next goes
    on, a successor as well.

    Args:
        store: of the sweeps.
        changes: wakes it when a job was moved.
        clock: Unix seconds.
    """

    def __init__(self, store: SweepStore, changes: Changes, *, clock: Callable[[], float]) -> None:
        self._store = store
        self._changes = changes
        self._clock = clock

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            changed = self._changes.next(QUEUE)
            try:
                await self.settle()
            except StoreUnavailable as error:
                log.warning("sweeps cannot be looked at: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await changed.wait()

    async def settle(self) -> None:
        """Look at every sweep once."""
        for name in await self._store.due():
            await self._store.settle(name, now=self._clock())
