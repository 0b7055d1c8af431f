"""The last decisions of each project: what they were made of is kept, and told when asked for."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Literal, NamedTuple

from rollmesh.types import Decision
from services.coordinator.scheduler.requests import request_name

if TYPE_CHECKING:
    from services.coordinator.scheduler.requests import Request

MAX_DECISIONS = 100
"""Kept of each project."""
MAX_PROJECTS = 1000
"""Whose decisions are kept; of more, those of whom nothing was decided for longest are let go."""


class _Kept(NamedTuple):
    """A decision that is put into words only when somebody asks."""

    time: float
    project: str
    # A job's name, or a request's number.
    subject: str | int
    job: str
    action: Literal["ASSIGNED", "PREEMPTED", "STARTED", "REFUSED"]
    address: str
    reason: str
    values: tuple[object, ...]


class Decisions:
    """At most MAX_DECISIONS of each of MAX_PROJECTS."""

    def __init__(self) -> None:
        self._by_project: OrderedDict[str, deque[_Kept]] = OrderedDict()

    def add(
        self,
        time: float,
        request: Request,
        action: Literal["ASSIGNED", "PREEMPTED", "REFUSED"],
        reason: str,
        *values: object,
        address: str = "",
    ) -> None:
        """One about a request; `reason` with `values` in its places."""
        project = request.project
        self._keep(_Kept(time, project, request.id, request.job, action, address, reason, values))

    def record(self, project: str, decision: Decision) -> None:
        """One that somebody else made: about a job."""
        subject, action, address = decision.subject, decision.action, decision.address
        reason = (decision.reason,)
        self._keep(_Kept(decision.time, project, subject, subject, action, address, "{}", reason))

    def of(self, project: str, subject: str = "") -> tuple[Decision, ...]:
        """The newest first; `subject`: only of this request or job and its requests."""
        return tuple(
            Decision(
                time=kept.time,
                subject=_subject(kept),
                action=kept.action,
                reason=kept.reason.format(*kept.values),
                address=kept.address,
            )
            for kept in reversed(self._by_project.get(project, ()))
            if not subject or subject in {_subject(kept), kept.job}
        )

    def _keep(self, kept: _Kept) -> None:
        decisions = self._by_project.get(kept.project)
        if decisions is None:
            decisions = self._by_project[kept.project] = deque(maxlen=MAX_DECISIONS)
            if len(self._by_project) > MAX_PROJECTS:
                self._by_project.popitem(last=False)
        else:
            self._by_project.move_to_end(kept.project)
        decisions.append(kept)


def _subject(kept: _Kept) -> str:
    if isinstance(kept.subject, str):
        return kept.subject
    return request_name(kept.project, kept.subject)
