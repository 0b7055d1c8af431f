"""An environment written by hand over the bare stubs, with hooks for what may be wrong with one.

It knows nothing of `rollmesh.environment`: what checks implementations is checked against another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.api.environment.v1.environment_service_pb2_grpc import (
    EnvironmentServiceServicer,
    add_EnvironmentServiceServicer_to_server,
)

LIMIT = 12
MAX_TURNS = 5
MAX_BATCH = 20
SPLITS = {"train": 7, "heldout": 3}
SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "count": {"type": "integer", "minimum": 1}},
    "required": ["text"],
}
SAID = pb.Message(role="assistant", content="x")
Code = grpc.StatusCode


class Parrot(EnvironmentServiceServicer):
    """Rewards the letters that an answer has of the task's word; an episode ends after two "a"."""

    tolerant = ""
    """A method that takes bytes which are no message for an empty one."""

    def __init__(self):
        self.playing = 0

    # --- what it says -----------------------------------------------------------------------------

    def info(self) -> pb.Environment:
        return pb.Environment(
            name="parrot",
            version="1",
            has_score=True,
            has_episodes=True,
            tools=[pb.Tool(name="say", parameters_schema_json=json.dumps(SCHEMA))],
            observation_kinds=[pb.OBSERVATION_KIND_TEXT, pb.OBSERVATION_KIND_TOOL],
            deterministic=True,
            limits=pb.Limits(
                max_concurrent_episodes=LIMIT, max_score_batch=MAX_BATCH, max_turns=MAX_TURNS
            ),
            splits=[pb.Split(name=name, num_tasks=count) for name, count in SPLITS.items()],
        )

    def infos(self) -> list[pb.Environment]:
        return [self.info()]

    async def Describe(self, request, context):
        return pb.DescribeResponse(environments=self.infos())

    # --- tasks ------------------------------------------------------------------------------------

    def tasks(self, split: str) -> list[pb.Task]:
        return [
            pb.Task(
                id=f"{split}/{n}",
                split=split,
                messages=[pb.Message(role="user", content="abcdefgh"[n:])],
                fields={"word": "abcdefgh"[n:]},
            )
            for n in range(SPLITS[split])
        ]

    async def ListTasks(self, request, context):
        if request.split not in SPLITS:
            await self.refuse(context, Code.INVALID_ARGUMENT, "split")
        tasks = self.tasks(request.split)
        if request.page_token and request.page_token not in map(str, range(len(tasks))):
            await self.refuse(context, Code.INVALID_ARGUMENT, "page_token")
        start = int(request.page_token or 0)
        stop = min(len(tasks), start + (request.page_size or 3))
        token = str(stop) if stop < len(tasks) else ""
        return pb.ListTasksResponse(tasks=tasks[start:stop], next_page_token=token)

    async def GetTask(self, request, context):
        for split in SPLITS:
            for task in self.tasks(split):
                if task.id == request.task_id:
                    return pb.GetTaskResponse(task=task)
        await self.refuse(context, Code.NOT_FOUND, "task")
        return None

    # --- single turns -----------------------------------------------------------------------------

    def worth(self, item: pb.ScoreItem) -> pb.Scored:
        letters = set(item.task.fields.get("word", ""))
        return pb.Scored(reward=float(len(letters & set(item.messages[-1].content))))

    async def Score(self, request, context):
        if not 1 <= len(request.items) <= MAX_BATCH:
            await self.refuse(context, Code.INVALID_ARGUMENT, "items")
        roles = {"system", "user", "assistant", "tool"}
        for item in request.items:
            if not item.messages or item.messages[-1].role != "assistant":
                await self.refuse(context, Code.INVALID_ARGUMENT, "messages")
            if not all(message.role in roles for message in item.messages):
                await self.refuse(context, Code.INVALID_ARGUMENT, "role")
        return pb.ScoreResponse(scored=[self.worth(item) for item in request.items])

    # --- episodes ---------------------------------------------------------------------------------

    def answer(self, action: pb.Message, turn: int, seed: int) -> pb.EpisodeResponse:
        """What comes of an action, before any limit."""
        observation = [
            pb.Message(role="tool", content="said", tool_call_id=call.id)
            for call in action.tool_calls
        ] or [pb.Message(role="user", content=f"more {seed}")]
        return pb.EpisodeResponse(observation=observation, reward=float("a" in action.content))

    def last(self) -> list[pb.EpisodeResponse]:
        """What follows the client's last word."""
        return [pb.EpisodeResponse(done=True, reward=0.5)]

    @contextlib.contextmanager
    def counted(self):
        self.playing += 1
        try:
            yield
        finally:
            self.playing -= 1

    async def Episode(self, requests, context):
        try:
            start = await anext(requests)
        except StopAsyncIteration:
            return
        if not start.HasField("start"):
            await self.refuse(context, Code.INVALID_ARGUMENT, "start first")
        if start.start.task_id not in {task.id for split in SPLITS for task in self.tasks(split)}:
            await self.refuse(context, Code.NOT_FOUND, "task")
        if self.playing >= LIMIT:
            await self.refuse(context, Code.RESOURCE_EXHAUSTED, "too many")
        with self.counted():
            async for response in self.played(start.start, requests, context):
                yield response

    async def played(self, start, requests, context):
        yield pb.EpisodeResponse(observation=[pb.Message(role="user", content="say a")])
        turn = found = 0
        async for request in requests:
            await self.check_action(request, context)
            turn += 1
            response = self.answer(request.action, turn, start.seed)
            found += "a" in request.action.content
            response.done = found == 2 or turn == MAX_TURNS
            response.truncated = found < 2 and turn == MAX_TURNS
            yield response
            if response.done:
                return
        await asyncio.sleep(
            0.01
        )  # A stream that breaks off ends so too, just before it is cancelled.
        for response in self.last():
            yield response

    async def check_action(self, request, context):
        if not request.HasField("action") or request.action.role != "assistant":
            await self.refuse(context, Code.INVALID_ARGUMENT, "action")

    async def refuse(self, context, code, what):
        await context.abort(code, f"{what} is wrong")


def _tolerant(servicer):
    """The methods of a service of which one takes anything."""

    def parsed(message, fallback):
        def parse(data):
            try:
                return message.FromString(data)
            except DecodeError:
                return fallback

        return parse

    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, name),
            getattr(pb, f"{name}Request").FromString,
            getattr(pb, f"{name}Response").SerializeToString,
        )
        for name in ("Describe", "ListTasks", "GetTask", "Score")
    }
    handlers["Episode"] = grpc.stream_stream_rpc_method_handler(
        servicer.Episode, pb.EpisodeRequest.FromString, pb.EpisodeResponse.SerializeToString
    )
    if servicer.tolerant == "Score":
        score = parsed(pb.ScoreRequest, pb.ScoreRequest(items=[pb.ScoreItem(messages=[SAID])]))
        handlers["Score"] = grpc.unary_unary_rpc_method_handler(
            servicer.Score, score, pb.ScoreResponse.SerializeToString
        )
    else:
        start = pb.EpisodeRequest(start=pb.Start(task_id="train/0"))
        handlers["Episode"] = grpc.stream_stream_rpc_method_handler(
            servicer.Episode,
            parsed(pb.EpisodeRequest, start),
            pb.EpisodeResponse.SerializeToString,
        )
    service = pb.DESCRIPTOR.services_by_name["EnvironmentService"].full_name
    return grpc.method_handlers_generic_handler(service, handlers)


@contextlib.asynccontextmanager
async def served(servicer: Parrot, *, health: str | None = "SERVING"):
    """The port of a server with `servicer`; `health` None: it has no health service."""
    server = grpc.aio.server()
    if servicer.tolerant:
        server.add_generic_rpc_handlers([_tolerant(servicer)])
    else:
        add_EnvironmentServiceServicer_to_server(servicer, server)
    if health:
        checks = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        await checks.set("", health_pb2.HealthCheckResponse.ServingStatus.Value(health))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)
