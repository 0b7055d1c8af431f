"""Runs the rules against a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.api.environment.v1.environment_service_pb2_grpc import EnvironmentServiceStub
from rollmesh.environment.conformance import (
    episode_rules,
    load_rules,
    refusal_rules,
    score_rules,
    serving_rules,
    task_rules,
)
from rollmesh.environment.conformance.rules import Rule, Verdict, said
from rollmesh.environment.conformance.subject import Subject
from rollmesh.errors import NotFound, Unavailable
from rollmesh.rpc.channel import MESSAGE_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RULES: tuple[Rule, ...] = (
    *serving_rules.RULES,
    *task_rules.RULES,
    *score_rules.RULES,
    *episode_rules.RULES,
    *refusal_rules.RULES,
    *load_rules.RULES,
)
"""All rules, in the order in which they are judged."""


@dataclass(frozen=True, slots=True)
class Report:
    """The verdicts on one environment."""

    environment: str
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no rule fails."""
        return all(verdict.outcome != "failed" for verdict in self.verdicts)


async def check(
    address: str,
    *,
    environment: str = "",
    answer_s: float = 10.0,
    num_episodes: int = 1_000,
    pid: int | None = None,
    tell: Callable[[str, Verdict], None] = lambda *_: None,
) -> list[Report]:
    """The verdicts on the environment of that name at `address` (host:port), or on all there.

    Args:
        address: host:port.
        environment: its name; empty: all.
        answer_s: seconds in which every answer has to come; more where it says that it is slow.
        num_episodes: episodes opened at once, where the environment allows as many.
        pid: of the server's process, where it runs here: then its memory is looked at too.
        tell: hears each verdict when it is reached, with the environment's name.

    Raises:
        Unavailable: Describe does not answer.
        NotFound: it tells of no such environment, or of none at all.
    """
    async with grpc.aio.insecure_channel(address, options=MESSAGE_OPTIONS) as channel:
        described = await _describe(channel, address, answer_s)
        chosen = [each for each in described if environment in {"", each.name}]
        if not chosen:
            names = ", ".join(each.name for each in described) or "none"
            raise NotFound(f"{address} has no environment {environment!r}; it has {names}")
        reports = []
        for info in chosen:
            subject = Subject(channel, info, answer_s=answer_s, num_episodes=num_episodes, pid=pid)
            reports.append(await _judge(subject, RULES, tell))
        return reports


async def _judge(
    subject: Subject, rules: Sequence[Rule], tell: Callable[[str, Verdict], None]
) -> Report:
    report = Report(subject.name)
    for rule in rules:
        verdict = await rule.judge(subject, report.verdicts)
        report.verdicts.append(verdict)
        tell(subject.name, verdict)
    return report


async def _describe(
    channel: grpc.aio.Channel, address: str, answer_s: float
) -> Sequence[pb.Environment]:
    stub = EnvironmentServiceStub(channel)
    try:
        response = await stub.Describe(pb.DescribeRequest(), timeout=answer_s, wait_for_ready=True)
    except grpc.aio.AioRpcError as error:
        raise Unavailable(f"Describe at {address} ended {said(error)}") from None
    return response.environments
