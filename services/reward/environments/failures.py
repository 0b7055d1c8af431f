"""What a failed call was: the environment's failure, its absence, or the caller's mistake.

An environment tells it by the status of the call. What is forwarded has been checked here, so that
where it finds fault with that, the fault is its own.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

from rollmesh.errors import (
    DeadlineExceeded,
    EnvironmentFailed,
    EnvironmentTimeout,
    EnvironmentUnavailable,
    MeshError,
    Overloaded,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ITS_OWN = (EnvironmentFailed, EnvironmentTimeout, EnvironmentUnavailable)
"""What an environment is to blame for."""
_KNOWN = ("field", "value", "allowed")
_TOO_LARGE = re.compile(r"message (larger than|exceeds( the)?) max", re.IGNORECASE)
"""How gRPC's libraries say with RESOURCE_EXHAUSTED that a message is too large (C++, Python, Go and
Node; Java and .NET): no waiting makes it smaller."""


def told(
    error: MeshError, *, environment: str, place: str, refusals: tuple[type[MeshError], ...]
) -> MeshError:
    """`error`, which a call raised at `place`, as whoever asked for `environment` needs it.

    `refusals`: classes that are the caller's mistake in this call.
    """
    kind: type[MeshError] = EnvironmentFailed
    if isinstance(error, refusals):
        kind = type(error)
    elif isinstance(error, Unavailable):
        kind = EnvironmentUnavailable
    elif isinstance(error, DeadlineExceeded):
        kind = EnvironmentTimeout
    elif error.status == "RESOURCE_EXHAUSTED" and not _TOO_LARGE.search(str(error)):
        kind = Overloaded
    # Of what an environment says only what is known: it may say anything.
    context = {key: value for key, value in error.context.items() if key in _KNOWN}
    context |= {"environment": environment, "replica": place}
    found = kind(f"environment {environment!r} at {place}: {error}", **context)
    if error.retry_after_s and found.retry_after_s:
        found.retry_after_s = error.retry_after_s
    return found


@contextlib.contextmanager
def first_of_several() -> Iterator[None]:
    """Raise what has failed first, without the task group around it."""
    try:
        yield
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
