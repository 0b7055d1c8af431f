"""The error catalogue: every failure that crosses a service border, without any transport.

A core raises one of these; `rollmesh.rpc.status` puts it on the wire as google.rpc.Status, and the
client raises the same class again. Anything else that escapes a core is a bug.
"""

from __future__ import annotations

from typing import ClassVar


class MeshError(Exception):
    """An expected failure.

    Attributes:
        status: canonical gRPC code name.
        reason: stable machine-readable name, the same on the wire.
        retry_after_s: seconds after which a retry makes sense, by the class unless the one who
            raises it knows better; 0: it does not.
        context: what the error is about, as strings: `field`, `value`, `allowed`, `resource`, …
    """

    status: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"
    retry_after_s: float = 0.0

    def __init__(self, message: str, **context: object) -> None:
        super().__init__(message)
        self.context = {key: str(value) for key, value in context.items()}


class InternalError(MeshError):
    """A bug, seen from the other side of the wire."""


class InvalidRequest(MeshError):
    """The caller sent something that can never work."""

    status, reason = "INVALID_ARGUMENT", "INVALID_REQUEST"


class NotFound(MeshError):
    """The named resource does not exist for this caller."""

    status, reason = "NOT_FOUND", "NOT_FOUND"


class AlreadyExists(MeshError):
    """The name, request_id or sequence is taken by something else."""

    status, reason = "ALREADY_EXISTS", "ALREADY_EXISTS"


class Conflict(MeshError):
    """Somebody else has changed it meanwhile; the context says `revision`, which it has now."""

    status, reason = "ABORTED", "CONFLICT"


class FailedPrecondition(MeshError):
    """The resource is not in the state that this needs."""

    status, reason = "FAILED_PRECONDITION", "FAILED_PRECONDITION"


class SequenceGap(FailedPrecondition):
    """A training op came too early or too late; the context says `expected_sequence`."""

    reason = "SEQUENCE_GAP"


class Fenced(FailedPrecondition):
    """The adapter has another owner by now, or this trainer is not yet it; the epoch says so."""

    reason = "FENCED"


class NonFinite(FailedPrecondition):
    """A loss or gradient is NaN or infinite; the adapter is as it was before the op."""

    reason = "NON_FINITE"


class DigestMismatch(FailedPrecondition):
    """The weights that arrived are not those that were asked for."""

    reason = "DIGEST_MISMATCH"


class Overloaded(MeshError):
    """A queue or quota is full; the context says which and how full."""

    status, reason, retry_after_s = "RESOURCE_EXHAUSTED", "OVERLOADED", 1.0


class QuotaExceeded(Overloaded):
    """A quota of the project is used up; the context says `quota`, `value` and `allowed`."""

    reason = "QUOTA_EXCEEDED"


class CapacityExhausted(MeshError):
    """No room, and waiting alone will not make any."""

    status, reason = "RESOURCE_EXHAUSTED", "CAPACITY_EXHAUSTED"


class Unavailable(MeshError):
    """The peer is away or going away; the same call may work in a moment."""

    status, reason, retry_after_s = "UNAVAILABLE", "UNAVAILABLE", 0.5


class SourceUnavailable(Unavailable):
    """A sampler is well and cannot have a version from its trainer."""

    reason = "SOURCE_UNAVAILABLE"


class EnvironmentUnavailable(Unavailable):
    """No replica of an environment takes work; the context says which: `environment`."""

    reason = "ENVIRONMENT_UNAVAILABLE"


class EnvironmentFailed(MeshError):
    """An environment failed at a call of its own; the context says which: `environment`."""

    reason = "ENVIRONMENT_FAILED"


class NotLeader(Unavailable):
    """This coordinator does not lead; the context says who does: `leader`, host:port or empty."""

    reason = "NOT_LEADER"


class DeadlineExceeded(MeshError):
    """The caller's own deadline passed first."""

    status, reason = "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"


class EnvironmentTimeout(DeadlineExceeded):
    """An environment did not answer in the time that it has; the context: `environment`."""

    reason = "ENVIRONMENT_TIMEOUT"


class Unimplemented(MeshError):
    """This build or backend cannot do that."""

    status, reason = "UNIMPLEMENTED", "UNIMPLEMENTED"


BY_REASON: dict[str, type[MeshError]] = {
    error.reason: error
    for error in (
        InternalError,
        InvalidRequest,
        NotFound,
        AlreadyExists,
        Conflict,
        FailedPrecondition,
        SequenceGap,
        Fenced,
        NonFinite,
        DigestMismatch,
        Overloaded,
        QuotaExceeded,
        CapacityExhausted,
        Unavailable,
        SourceUnavailable,
        EnvironmentUnavailable,
        EnvironmentFailed,
        NotLeader,
        DeadlineExceeded,
        EnvironmentTimeout,
        Unimplemented,
    )
}
