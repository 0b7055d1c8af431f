"""What the scheduler tells of a project."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from rollmesh import types
from rollmesh.api.coordinator.v1 import fleet_service_pb2 as pb
from rollmesh.convert.values import time_from_pb, time_to_pb

if TYPE_CHECKING:
    from typing import Any


def schedule_to_pb(schedule: types.Schedule) -> pb.ExplainScheduleResponse:
    """ExplainScheduleResponse."""
    return pb.ExplainScheduleResponse(
        waiting=[waiting_to_pb(waiting) for waiting in schedule.waiting],
        num_waiting=schedule.num_waiting,
        decisions=[
            pb.Decision(
                time=time_to_pb(decision.time),
                subject=decision.subject,
                action=decision.action,
                address=decision.address,
                reason=decision.reason,
            )
            for decision in schedule.decisions
        ],
        shares=[
            pb.Share(
                base_model=share.base_model,
                weight=share.weight,
                virtual_tokens=share.virtual_tokens,
                num_queued=share.num_queued,
                num_running=share.num_running,
                entitled=share.entitled,
            )
            for share in schedule.shares
        ],
        quotas=[
            pb.Quota(name=quota.name, used=quota.used, allowed=quota.allowed)
            for quota in schedule.quotas
        ],
    )


def waiting_to_pb(waiting: types.Waiting) -> pb.Waiting:
    """Waiting."""
    return pb.Waiting(
        subject=waiting.subject,
        rule=waiting.rule,
        reason=waiting.reason,
        release=waiting.release,
        position=waiting.position,
        ahead=waiting.ahead,
        since=time_to_pb(waiting.since),
        job=waiting.job,
    )


def schedule_from_pb(message: pb.ExplainScheduleResponse) -> types.Schedule:
    """ExplainScheduleResponse."""
    return types.Schedule(
        waiting=tuple(
            types.Waiting(
                subject=waiting.subject,
                rule=waiting.rule,
                reason=waiting.reason,
                release=waiting.release,
                position=waiting.position,
                since=time_from_pb(waiting.since),
                ahead=tuple(waiting.ahead),
                job=waiting.job,
            )
            for waiting in message.waiting
        ),
        num_waiting=message.num_waiting,
        decisions=tuple(
            types.Decision(
                time=time_from_pb(decision.time),
                subject=decision.subject,
                # A newer server may say more than this client knows: it is for people to read.
                action=cast("Any", decision.action),
                reason=decision.reason,
                address=decision.address,
            )
            for decision in message.decisions
        ),
        shares=tuple(
            types.Share(
                base_model=share.base_model,
                weight=share.weight,
                virtual_tokens=share.virtual_tokens,
                num_queued=share.num_queued,
                num_running=share.num_running,
                entitled=share.entitled,
            )
            for share in message.shares
        ),
        quotas=tuple(
            types.Quota(
                name=cast("Any", quota.name),
                used=quota.used,
                allowed=quota.allowed if quota.HasField("allowed") else None,
            )
            for quota in message.quotas
        ),
    )
