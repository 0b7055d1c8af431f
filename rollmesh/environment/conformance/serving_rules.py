"""Rules of what a server says of itself."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import grpc
import jsonschema
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.environment.conformance.rules import Broken, Rule, Skipped, rule
from rollmesh.names import ID_PATTERN

if TYPE_CHECKING:
    from rollmesh.environment.conformance.subject import Subject

_NAME = re.compile(ID_PATTERN)
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]+")


@rule()
async def health(subject: Subject) -> None:
    """The server has grpc.health.v1, which says SERVING of the server as a whole (service "")."""
    health: Any = health_pb2_grpc.HealthStub(subject.channel)  # its types leave its calls out
    request = health_pb2.HealthCheckRequest()
    response = await health.Check(request, timeout=subject.answer_s)
    if response.status != health_pb2.HealthCheckResponse.SERVING:
        said = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
        raise Broken(f"it says {said}")


@rule()
async def described(subject: Subject) -> None:
    """Describe says all that it has to, and the same when it is asked again.

    A name, a version, splits, kinds of observations, no limit below 0, and that the environment
    can score or has episodes.
    """
    info = subject.info
    _check_name("name", info.name)
    if not info.version:
        raise Broken("version is empty")
    if not (info.has_score or info.has_episodes):
        raise Broken("it has neither Score nor Episode")
    if not info.splits:
        raise Broken("splits is empty")
    names = [split.name for split in info.splits]
    for name in names:
        _check_name("the name of a split", name)
    if len(set(names)) < len(names):
        raise Broken(f"two splits have one name: {names}")
    known = set(pb.ObservationKind.values()) - {pb.OBSERVATION_KIND_UNSPECIFIED}
    if not known.intersection(info.observation_kinds):
        raise Broken(f"observation_kinds names none that exists: {list(info.observation_kinds)}")
    limits = info.limits
    numbers = (limits.max_concurrent_episodes, limits.max_score_batch, limits.max_turns)
    if min(*numbers, *(split.num_tasks for split in info.splits)) < 0:
        raise Broken("a limit or a number of tasks is below 0")
    if limits.max_answer_time.ToNanoseconds() < 0:
        raise Broken("limits.max_answer_time is below 0")
    response = await subject.stub.Describe(pb.DescribeRequest(), timeout=subject.answer_s)
    if info not in response.environments:
        raise Broken("the second Describe tells something else than the first")


@rule()
async def tools_described(subject: Subject) -> None:
    """Every tool has a name of its own and a JSON Schema of its arguments.

    The name is of letters, digits, '_' and '-'; the schema is one of an object, or empty where
    there are no arguments.
    """
    tools = subject.info.tools
    if not tools:
        raise Skipped("it has no tools")
    if len({tool.name for tool in tools}) < len(tools):
        raise Broken(f"two tools have one name: {[tool.name for tool in tools]}")
    for tool in tools:
        if not _TOOL_NAME.fullmatch(tool.name):
            raise Broken(f"{tool.name!r} is no name of a tool")
        if tool.parameters_schema_json:
            _check_schema(tool)


@rule()
async def environment_unknown(subject: Subject) -> None:
    """A server of several environments knows none by a name that it did not tell: NOT_FOUND."""
    response = await subject.stub.Describe(pb.DescribeRequest(), timeout=subject.answer_s)
    if len(response.environments) == 1:
        raise Skipped("the server has one environment, and need not look at the name")
    request = pb.ListTasksRequest(environment="no-such-one", split=subject.info.splits[0].name)
    await subject.refused(
        subject.stub.ListTasks(request, timeout=subject.answer_s),
        "an unknown environment",
        grpc.StatusCode.NOT_FOUND,
    )


@rule("described")
async def offers_no_more(subject: Subject) -> None:
    """What the environment says that it does not offer, Score or Episode, is UNIMPLEMENTED."""
    info = subject.info
    if info.has_score and info.has_episodes:
        raise Skipped("it has both Score and Episode")
    if not info.has_score:
        item = pb.ScoreItem(
            task=pb.Task(id="x"), messages=[pb.Message(role="assistant", content="x")]
        )
        await subject.refused(
            subject.score([item]), "Score, which it does not have,", grpc.StatusCode.UNIMPLEMENTED
        )
    else:
        async with subject.stream() as stream:
            await subject.refused(
                stream.begin("x"),
                "Episode, which it does not have,",
                grpc.StatusCode.UNIMPLEMENTED,
            )


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise Broken(
            f"{what} is {name[:100]!r}; it is to be 1–63 of a-z, 0-9 and '-', starting with a "
            "letter, not ending with '-'"
        )


def _check_schema(tool: pb.Tool) -> None:
    try:
        schema = json.loads(tool.parameters_schema_json)
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except (ValueError, TypeError, jsonschema.SchemaError) as error:
        first = str(error).splitlines()[0]
        raise Broken(f"the schema of tool {tool.name!r} is no JSON Schema: {first}") from None
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise Broken(f"the schema of tool {tool.name!r} is not one of an object")


RULES: tuple[Rule, ...] = (health, described, tools_described, environment_unknown, offers_no_more)
