"""What the endpoints need of the gateway: who calls, what Tinker's paths mean, where to keep turns.

Clients of the coordinator are asked directly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from starlette.requests import Request

    from rollmesh.types import PolicyRef


def key_of(request: Request) -> str:
    """The key that a request shows: `Authorization: Bearer KEY`, else `X-API-Key: KEY`, else ""."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")


class ProjectOf(Protocol):
    """Whose request it is, by its key: that of `key_of`."""

    async def __call__(self, request: Request) -> str | None:
        """The project, projects/{p}; None: it shows no key, or one of nobody."""
        ...


class CheckpointPolicy(Protocol):
    """What one of Tinker's paths names."""

    async def __call__(self, project: str, path: str) -> tuple[str, PolicyRef]:
        """The base model, and the version of an adapter, behind tinker://…/sampler_weights/….

        Raises:
            NotFound: the project has no such path.
        """
        ...


class Record(Protocol):
    """A small document; `rollmesh.types.Record` is one."""

    @property
    def value(self) -> bytes:
        """At most MAX_RECORD_BYTES."""
        ...


class Records(Protocol):
    """Small documents of a project; `rollmesh.client.RecordClient` is it."""

    async def put(self, project: str, key: str, value: bytes, *, ttl_s: float | None = None) -> Any:
        """Write one, for `ttl_s` seconds."""
        ...

    async def get(self, project: str, key: str) -> Record:
        """Read one. NotFound: there is none, or it has expired."""
        ...
