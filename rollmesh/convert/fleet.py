"""Reward items; the members of the mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.api.coordinator.v1 import fleet_service_pb2
from rollmesh.api.reward.v1 import reward_service_pb2
from rollmesh.convert.values import time_from_pb, time_to_pb

if TYPE_CHECKING:
    from collections.abc import Iterable

_ROLES: dict[types.MemberRole, fleet_service_pb2.MemberRole.ValueType] = {
    "trainer": fleet_service_pb2.MEMBER_ROLE_TRAINER,
    "sampler": fleet_service_pb2.MEMBER_ROLE_SAMPLER,
    "reward": fleet_service_pb2.MEMBER_ROLE_REWARD,
    "environment": fleet_service_pb2.MEMBER_ROLE_ENVIRONMENT,
}


def score_items_to_pb(items: Iterable[types.ScoreItem]) -> list[reward_service_pb2.ScoreItem]:
    """ScoreItems."""
    return [
        reward_service_pb2.ScoreItem(
            completion=item.completion, reference=item.reference, prompt=item.prompt
        )
        for item in items
    ]


def score_items_from_pb(messages: Iterable[reward_service_pb2.ScoreItem]) -> list[types.ScoreItem]:
    """ScoreItems."""
    return [types.ScoreItem(item.completion, item.reference, item.prompt) for item in messages]


def fleet_to_pb(fleet: types.Fleet) -> fleet_service_pb2.GetFleetResponse:
    """GetFleetResponse."""
    return fleet_service_pb2.GetFleetResponse(
        members=[
            fleet_service_pb2.Member(
                role=_ROLES[member.role],
                address=member.address,
                serving=member.serving,
                base_model=member.base_model,
                problem=member.problem,
                num_adapters=member.num_adapters,
                num_running=member.num_running,
                update_time=time_to_pb(member.update_time),
                backend=member.backend,
            )
            for member in fleet.members
        ],
        num_queued_requests=fleet.num_queued_requests,
    )


def fleet_from_pb(message: fleet_service_pb2.GetFleetResponse) -> types.Fleet:
    """GetFleetResponse."""
    roles = {number: role for role, number in _ROLES.items()}
    return types.Fleet(
        members=tuple(
            types.Member(
                role=roles[member.role],
                address=member.address,
                serving=member.serving,
                base_model=member.base_model,
                problem=member.problem,
                num_adapters=member.num_adapters,
                num_running=member.num_running,
                update_time=time_from_pb(member.update_time),
                backend=member.backend,
            )
            for member in message.members
        ),
        num_queued_requests=message.num_queued_requests,
    )
