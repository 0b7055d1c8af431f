"""Rows of adapters, versions and leases, to and from what they mean."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, func, insert, select, update

from rollmesh import types
from rollmesh.errors import AlreadyExists, FailedPrecondition, NotFound, QuotaExceeded
from rollmesh.job import FINAL_STATES
from rollmesh.names import parse_adapter
from services.coordinator.store import requests
from services.coordinator.store.database import serialize
from services.coordinator.store.tables import adapters, jobs, leases, versions

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Row
    from sqlalchemy.ext.asyncio import AsyncConnection


_ROOM_AFTER_S = 10.0
"""When to ask again where a project has all its adapters: somebody has to delete one."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a fork began with."""

    snapshot: types.Snapshot
    with_optimizer: bool


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter as its done ops left it; `owned` by a job that has not ended.

    Attributes:
        trainer: address of its owner, under `epoch`; "": none yet.
        ready: whether it exists; else its name is reserved.
        counts: for the quota of its project: it exists, or is being made.
        snapshot: what recovery begins with; None: with `origin`, or (None) a fresh adapter.
        num_versions: how many its trainer has to keep.
        problem: why it cannot be recovered; "": it can.
        use_time: Unix seconds, to the minute.
    """

    adapter: types.Adapter
    trainer: str
    ready: bool
    counts: bool
    owned: bool
    epoch: int
    snapshot: types.Snapshot | None
    origin: Origin | None
    num_versions: int
    problem: str
    use_time: float


async def reserve(
    connection: AsyncConnection,
    name: str,
    base_model: str,
    lora: types.LoraConfig,
    *,
    job: str,
    now: float,
    num_versions: int = 1,
    idle_ttl_s: float | None = None,
    origin: Origin | None = None,
    max_adapters: int | None = None,
) -> None:
    """Take the name of an adapter, for `job` or ("") an interactive client.

    A name whose adapter never came to be is free again once the job that wanted it has ended. What
    an interactive client left half made is for interactive clients alone: it may still be at it.

    A job's first reservation is of the name alone; one that it has already is so that the adapter
    is made, and like an interactive client's takes one of `max_adapters` of the project.

    Raises:
        AlreadyExists: the name is taken.
        QuotaExceeded: the project has `max_adapters`, those that are being made included.
    """
    found = await connection.execute(SELECT.where(adapters.c.name == name))
    row = found.one_or_none()
    values = {
        "base_model": base_model,
        "lora": lora_to_json(lora),
        "job": job or None,
        "create_time": now,
        "num_versions": num_versions,
        "idle_ttl_s": idle_ttl_s,
        "origin": None if origin is None else json.dumps(dataclasses.asdict(origin)),
        "use_time": now,
        "counts": not job,
    }
    project, _ = parse_adapter(name)
    if row is None:
        if not job:
            await _check_room(connection, project, max_adapters)
        await connection.execute(
            insert(adapters).values(
                name=name,
                project=project,
                trainer="",
                ready=False,
                policy_version=0,
                next_sequence=1,
                published_digest="",
                epoch=0,
                problem="",
                **values,
            )
        )
        return
    stored = stored_of(row)
    if job and stored.adapter.job == job:
        # Reserved with the job, which did not say more than its name.
        await claim(connection, row, max_adapters)
        await connection.execute(
            update(adapters).where(adapters.c.name == name).values(num_versions=num_versions)
        )
        return
    if stored.ready or stored.owned or (job and not stored.adapter.job):
        raise taken(name)
    if not job:
        await claim(connection, row, max_adapters)
    await requests.forget(connection, name)
    await connection.execute(update(adapters).where(adapters.c.name == name).values(**values))


async def claim(connection: AsyncConnection, row: Row[Any], max_adapters: int | None) -> None:
    """A reserved adapter is made now, and counts from now on. QuotaExceeded: as `reserve`."""
    if not row.counts:
        await _check_room(connection, row.project, max_adapters)
        counted = update(adapters).where(adapters.c.name == row.name)
        await connection.execute(counted.values(counts=True))


async def _check_room(connection: AsyncConnection, project: str, max_adapters: int | None) -> None:
    if max_adapters is None:
        return
    # Else two who come at the same time would both find the last place.
    await serialize(connection, f"adapters of {project}")
    num_adapters = await count(connection, project)
    if num_adapters >= max_adapters:
        error = QuotaExceeded(
            f"project {project!r} has {num_adapters} adapters, and its quota is {max_adapters}: "
            "another one can be made once one of them is deleted",
            project=project,
            quota="adapters",
            value=num_adapters,
            allowed=max_adapters,
        )
        error.retry_after_s = _ROOM_AFTER_S
        raise error


async def count(connection: AsyncConnection, project: str) -> int:
    """Adapters of a project that are there or are being made."""
    counted = select(func.count()).where(adapters.c.project == project, adapters.c.counts)
    number: int = (await connection.execute(counted)).scalar_one()
    return number


def check_free(stored: StoredAdapter) -> None:
    """Raise FailedPrecondition where a job that has not ended owns the adapter."""
    if stored.owned:
        raise FailedPrecondition(
            f"{stored.adapter.name} belongs to {stored.adapter.job}, which has not ended",
            resource=stored.adapter.name,
            job=stored.adapter.job,
        )


SELECT = select(adapters, jobs.c.phase).join_from(
    adapters, jobs, adapters.c.job == jobs.c.name, isouter=True
)


_ONE = SELECT.where(adapters.c.name == bindparam("named"))
_ONE_LOCKED = _ONE.with_for_update(of=adapters)


async def row_of(connection: AsyncConnection, name: str, *, lock: bool = False) -> Row[Any]:
    """The adapter, with the phase of the job that owns it."""
    found = await connection.execute(_ONE_LOCKED if lock else _ONE, {"named": name})
    row = found.one_or_none()
    if row is None:
        raise missing(name)
    return row


async def version_of(
    connection: AsyncConnection, name: str, policy_version: int
) -> types.PublishedVersion | None:
    """The published version of that number; None: it was not published, or is kept no longer."""
    found = await connection.execute(
        select(versions).where(
            versions.c.adapter == name, versions.c.policy_version == policy_version
        )
    )
    row = found.one_or_none()
    return None if row is None else published_of(row)


async def kept_version(
    connection: AsyncConnection, row: Row[Any], policy_version: int | None
) -> types.PublishedVersion:
    """A version of the adapter in `row` that is kept; None: the newest. NotFound: there is none."""
    name, newest = row.name, row.published_version
    if not row.ready:
        raise missing(name)
    if policy_version is None:
        policy_version = newest
    if policy_version is None:
        raise NotFound(f"no version of {name} was published yet", resource=name)
    known = await version_of(connection, name, policy_version)
    if known is not None:
        return known
    if newest is None or policy_version > newest:
        problem = f"version {policy_version} of {name} was not published; the newest is {newest}"
    else:
        problem = (
            f"version {policy_version} of {name} is no longer kept, or was not published; the "
            f"newest is {newest}, and what is superseded is kept for as long as somebody has a "
            "lease on it (CreateLease)"
        )
    raise NotFound(problem, resource=name, value=policy_version)


def published_of(row: Row[Any]) -> types.PublishedVersion:
    """The version that a row of `versions` tells."""
    return types.PublishedVersion(row.policy_version, row.digest, row.export_key)


def is_open(now: float) -> ColumnElement[bool]:
    """Whether a lease holds its version at the moment `now`."""
    return leases.c.expire_time > now


def stored_of(row: Row[Any]) -> StoredAdapter:
    """The adapter that a row of SELECT tells."""
    lora = json.loads(row.lora)
    lora["target_modules"] = tuple(lora["target_modules"])
    return StoredAdapter(
        adapter=types.Adapter(
            name=row.name,
            base_model=row.base_model,
            lora=types.LoraConfig(**lora),
            policy_version=row.policy_version,
            published_version=row.published_version,
            published_digest=row.published_digest,
            next_sequence=row.next_sequence,
            create_time=row.create_time,
            job=row.job or "",
            idle_ttl_s=row.idle_ttl_s,
        ),
        trainer=row.trainer,
        ready=row.ready,
        counts=row.counts,
        owned=row.phase is not None and row.phase not in FINAL_STATES,
        epoch=row.epoch,
        snapshot=None if row.snapshot is None else types.Snapshot(**json.loads(row.snapshot)),
        origin=None if row.origin is None else _origin_of(row.origin),
        num_versions=row.num_versions,
        problem=row.problem,
        use_time=row.use_time,
    )


def _origin_of(text: str) -> Origin:
    values = json.loads(text)
    return Origin(types.Snapshot(**values["snapshot"]), values["with_optimizer"])


def lora_to_json(lora: types.LoraConfig) -> str:
    """As the column `lora` has it."""
    return json.dumps(dataclasses.asdict(lora))


def missing(name: str) -> NotFound:
    """What asking for an adapter that is not there raises."""
    return NotFound(f"there is no {name}", resource=name)


def taken(name: str) -> AlreadyExists:
    """What asking for a name that is taken raises."""
    return AlreadyExists(f"there is a {name} already", resource=name)
