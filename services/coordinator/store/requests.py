"""Request ids: the same id with the same content answers what the first one made."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import delete, insert, select

from rollmesh.errors import AlreadyExists, InvalidRequest
from services.coordinator.store.tables import requests

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

_MAX_LENGTH = 128


@dataclass(frozen=True, slots=True)
class Request:
    """A mutation that its caller may repeat. Ids of different projects never meet."""

    project: str
    id: str
    digest: str

    @classmethod
    def of(cls, project: str, request_id: str, method: str, *content: object) -> Request:
        """The request of `project`, `method` with that `content`, which JSON can say.

        Raises:
            InvalidRequest: no request_id, or an overlong one.
        """
        if not 1 <= len(request_id) <= _MAX_LENGTH:
            raise InvalidRequest(
                f"request_id: 1 to {_MAX_LENGTH} characters are needed, not {len(request_id)}",
                field="request_id",
                value=request_id[:_MAX_LENGTH],
            )
        body = json.dumps([method, *content], sort_keys=True)
        return cls(project, request_id, hashlib.sha256(body.encode()).hexdigest())


def derived_request_id(*parts: str | int) -> str:
    """The id of a request that the coordinator makes itself: one for each `parts`."""
    # Names alone may take more room than an id has.
    return f"rollmesh-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"


async def find(connection: AsyncConnection, request: Request) -> str | None:
    """Name of what `request` made before ("" if it deleted something); None: it is new.

    Raises:
        AlreadyExists: its id was used with other content.
    """
    row = (
        await connection.execute(
            select(requests.c.digest, requests.c.resource).where(
                requests.c.project == request.project, requests.c.request_id == request.id
            )
        )
    ).one_or_none()
    if row is None:
        return None
    if row.digest != request.digest:
        raise AlreadyExists(
            f"request_id {request.id!r} was used for another request",
            field="request_id",
            value=request.id,
        )
    return str(row.resource)


async def remember(
    connection: AsyncConnection, request: Request, resource: str, *, now: float, retention_s: float
) -> None:
    """Note what `request` made, and forget what is older than `retention_s`."""
    await connection.execute(delete(requests).where(requests.c.create_time < now - retention_s))
    await connection.execute(
        insert(requests).values(
            project=request.project,
            request_id=request.id,
            digest=request.digest,
            resource=resource,
            create_time=now,
        )
    )


async def forget(connection: AsyncConnection, resource: str) -> None:
    """Let the requests that made `resource` be made anew."""
    await connection.execute(delete(requests).where(requests.c.resource == resource))
