"""Rules of what an episode's stream does not take."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc

from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.environment.conformance import actions
from rollmesh.environment.conformance.rules import Broken, Rule, Skipped, rule

if TYPE_CHECKING:
    from rollmesh.environment.conformance.subject import Subject


@rule("begins")
async def refuses_action_first(subject: Subject) -> None:
    """An action before `start` is INVALID_ARGUMENT."""
    async with subject.stream() as stream:
        await subject.refused(
            stream.act(actions.text("1")),
            "an action before start",
            grpc.StatusCode.INVALID_ARGUMENT,
        )


@rule("begins")
async def refuses_second_start(subject: Subject) -> None:
    """A second `start` is INVALID_ARGUMENT."""
    async with subject.stream() as stream:
        first = await stream.begin(subject.tasks[0].id)
        if first.done:
            raise Skipped("the episode is done at once")
        await subject.refused(
            stream.begin(subject.tasks[0].id),
            "a second start",
            grpc.StatusCode.INVALID_ARGUMENT,
        )


@rule("begins")
async def refuses_wrong_role(subject: Subject) -> None:
    """An action that is not the assistant's is INVALID_ARGUMENT, and so is a request of nothing."""
    requests = {
        f"an action of {role!r}": pb.EpisodeRequest(action=pb.Message(role=role, content="1"))
        for role in ("user", "tool", "nobody", "")
    }
    requests["a request of nothing"] = pb.EpisodeRequest()
    for what, request in requests.items():
        async with subject.stream() as stream:
            if (await stream.begin(subject.tasks[0].id)).done:
                raise Skipped("the episode is done at once")
            await stream.send(request)
            await subject.refused(stream.read(), what, grpc.StatusCode.INVALID_ARGUMENT)


@rule("begins")
async def refuses_unknown_task(subject: Subject) -> None:
    """An episode of a task that does not exist is NOT_FOUND."""
    for task_id in ("", "no-such-task", "../../etc/passwd", "x" * 300):
        async with subject.stream() as stream:
            await subject.refused(
                stream.begin(task_id),
                f"an episode of task {task_id[:20]!r}",
                grpc.StatusCode.NOT_FOUND,
            )


@rule("begins")
async def episode_malformed(subject: Subject) -> None:
    """Bytes that are no message end the stream with an error, and the server goes on."""
    start = pb.Start(environment=subject.name, task_id=subject.tasks[0].id)
    good = pb.EpisodeRequest(start=start).SerializeToString()
    for messages in ([b"\xff" * 64], [good, b"\xff" * 64], [good, b"\x12\xff\xff\xff\xff\x0f"]):
        call = subject.raw("Episode", stream=True)(iter(messages))
        try:
            async with asyncio.timeout(subject.answer_s):
                async for _ in call:
                    pass
        except TimeoutError:
            raise Broken("bytes that are no message: nothing came in time") from None
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise Broken(f"bytes that are no message: {error.code().name}") from None
        else:
            raise Broken("bytes that are no message end the stream as if all were well")
        finally:
            call.cancel()
    async with subject.stream() as stream:
        await stream.begin(subject.tasks[0].id)


RULES: tuple[Rule, ...] = (
    refuses_action_first,
    refuses_second_start,
    refuses_wrong_role,
    refuses_unknown_task,
    episode_malformed,
)
