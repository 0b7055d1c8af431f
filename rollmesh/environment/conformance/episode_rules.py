"""Rules of episodes, one at a time."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import grpc

from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.environment.conformance import actions
from rollmesh.environment.conformance.rules import Broken, Rule, Skipped, rule, said

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rollmesh.environment.conformance.subject import Stream, Subject

_MAX_ACTIONS = 64
"""Actions of an episode that nothing ends."""
_NUM_SEEDS = 4


def tame_actions(subject: Subject, count: int, seed: int = 0) -> list[pb.Message]:
    """Actions of which none asks for anything special."""
    rng = random.Random(seed)  # noqa: S311 - no secret
    return [actions.tame(subject.info.tools, rng) for _ in range(count)]


async def play(
    stream: Stream, task_id: str, seed: int, moves: Sequence[pb.Message]
) -> list[pb.EpisodeResponse]:
    """The responses to `start` and to `moves`, up to one that is done."""
    responses = [await stream.begin(task_id, seed)]
    for move in moves:
        if responses[-1].done:
            break
        responses.append(await stream.act(move))
    return responses


@rule("tasks-listed")
async def begins(subject: Subject) -> None:
    """`start` is answered by the first observation, of any task that is listed."""
    if not subject.info.has_episodes:
        raise Skipped("it has no episodes")
    for task in subject.tasks:
        async with subject.stream() as stream:
            first = await stream.begin(task.id)
            if not (first.observation or first.done):
                raise Broken(f"the first response of task {task.id!r} has no observation")


@rule("begins")
async def observes(subject: Subject) -> None:
    """Observations are of the kinds that Describe tells, and rewards are finite.

    Messages of "system" and "user"; of "tool" where it says so, each for a call of the action.
    There is an observation until the episode is done.
    """
    for seed, task in enumerate(subject.tasks[:_NUM_SEEDS]):
        moves = tame_actions(subject, _MAX_ACTIONS, seed)
        async with subject.stream() as stream:
            responses = await play(stream, task.id, seed, moves)
        for turn, response in enumerate(responses):
            called = {call.id for call in moves[turn - 1].tool_calls} if turn else set()
            try:
                _check(response, called, subject.info)
            except Broken as broken:
                raise Broken(f"response {turn} of task {task.id!r}: {broken}") from None


@rule("begins")
async def survives_any_action(subject: Subject) -> None:
    """Any action is answered: whatever a model says, it is no error.

    Empty, long, of odd characters, with calls of tools that do not exist or whose arguments do not
    fit.
    """
    rng = random.Random(0)  # noqa: S311 - no secret
    for action in actions.odd(subject.info.tools, rng):
        async with subject.stream() as stream:
            first = await stream.begin(subject.tasks[0].id)
            try:
                if not first.done:
                    await stream.act(action)
            except (Broken, grpc.aio.AioRpcError) as error:
                why = said(error) if isinstance(error, grpc.aio.AioRpcError) else str(error)
                calls = ", ".join(f"{c.name}({c.arguments_json[:20]})" for c in action.tool_calls)
                raise Broken(f"the action {action.content[:20]!r} {calls}: {why}") from None


@rule("begins")
async def ends_when_done(subject: Subject) -> None:
    """After a response with `done` the server ends the stream well and says nothing more."""
    async with subject.stream() as stream:
        limit = subject.info.limits.max_turns
        moves = tame_actions(subject, max(limit, _MAX_ACTIONS))
        responses = await play(stream, subject.tasks[0].id, 0, moves)
        if not responses[-1].done:
            raise Skipped(f"no episode is done within {len(moves)} actions")
        try:
            more = await stream.read()
        except Broken as broken:
            raise Broken(f"after the response with done: {broken}") from None
        if more is not None:
            raise Broken("another response comes after the one with done")


@rule("begins")
async def keeps_max_turns(subject: Subject) -> None:
    """The answer to action number limits.max_turns says that the episode is done."""
    limit = subject.info.limits.max_turns
    if not limit:
        raise Skipped("it has no max_turns")
    for seed in range(_NUM_SEEDS):
        async with subject.stream() as stream:
            task = subject.tasks[seed % len(subject.tasks)]
            moves = tame_actions(subject, limit, seed)
            responses = await play(stream, task.id, seed, moves)
            if not responses[-1].done:
                raise Broken(f"it is not done after {limit} actions")


@rule("begins")
async def half_closes(subject: Subject) -> None:
    """When the client has no more actions the server ends the stream well.

    Before that it may send one last response, with `done`.
    """
    for moves in ([], tame_actions(subject, 1)):
        async with subject.stream() as stream:
            responses = await play(stream, subject.tasks[0].id, 0, moves)
            await stream.half_close()
            last = None if responses[-1].done else await stream.read()
            if last is not None and not last.done:
                raise Broken("the last response, after the client's last word, is not done")
            if await stream.read() is not None:
                raise Broken("more than one response comes after the client's last word")


@rule("begins")
async def half_closes_at_once(subject: Subject) -> None:
    """A stream on which nothing comes but its end is ended, whether well or not."""
    async with subject.stream() as stream:
        await stream.half_close()
        try:
            await stream.read()
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.INVALID_ARGUMENT:
                raise Broken(f"it ended {said(error)}") from None


@rule("begins")
async def deterministic(subject: Subject) -> None:
    """The same task, seed and actions give the same observations and rewards.

    Only where the environment promises it.
    """
    if not subject.info.deterministic:
        raise Skipped("it does not promise to be deterministic")
    for seed, task in enumerate(subject.tasks[:_NUM_SEEDS]):
        moves = tame_actions(subject, _MAX_ACTIONS, seed)
        plays = []
        for _ in range(2):
            async with subject.stream() as stream:
                plays.append(await play(stream, task.id, seed, moves))
        for turn, (one, other) in enumerate(zip(*plays, strict=False)):
            if _compared(one) != _compared(other):
                raise Broken(
                    f"response {turn} of task {task.id!r} with seed {seed} differs the second time"
                )


def _compared(response: pb.EpisodeResponse) -> bytes:
    """What is to be the same each time: all but `info`; and NaN is NaN."""
    compared = pb.EpisodeResponse()
    compared.CopyFrom(response)
    compared.ClearField("info")
    return compared.SerializeToString(deterministic=True)


def _check(response: pb.EpisodeResponse, called: set[str], info: pb.Environment) -> None:
    if not (response.observation or response.done):
        raise Broken("it has no observation and is not done")
    if response.truncated and not response.done:
        raise Broken("it is truncated and not done")
    for name, value in {"reward": response.reward, **response.rewards}.items():
        if not math.isfinite(value):
            raise Broken(f"{name} is {value}")
    allowed = {"system", "user"}
    if pb.OBSERVATION_KIND_TOOL in info.observation_kinds:
        allowed.add("tool")
    for message in response.observation:
        if message.role not in allowed:
            raise Broken(f"it has a message of {message.role!r}, which its kinds do not tell")
        if message.role == "tool" and message.tool_call_id not in called:
            raise Broken(f"it answers the call {message.tool_call_id!r}, which nobody made")


RULES: tuple[Rule, ...] = (
    begins,
    observes,
    survives_any_action,
    ends_when_done,
    keeps_max_turns,
    half_closes,
    half_closes_at_once,
    deterministic,
)
