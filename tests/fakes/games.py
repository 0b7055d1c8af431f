"""An environment that behaves as its tasks and actions say, and counts what it holds.

As a process: `python -m tests.fakes.games --listen HOST:PORT`. It says where it listens; the
task `counts` tells in its fields what it holds.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import os

import grpc

from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.api.environment.v1.environment_service_pb2_grpc import (
    EnvironmentServiceServicer,
    add_EnvironmentServiceServicer_to_server,
)
from rollmesh.rpc.server import serving, terminated

SERVICE = pb.DESCRIPTOR.services_by_name["EnvironmentService"].full_name
PAGE = 3
NUM_TASKS = 8


class Game(EnvironmentServiceServicer):
    """A task's id says how an episode begins, the text of an action what comes of it.

    `status:CODE`: the call ends with that code; as a task, `once:CODE`: the first time only.
    `hang`: no answer. Actions: `done`, `leave` (the stream ends well, too early), `leave soon` (the
    same, after the answer), `leave later` (when it may go on), `nan`, `nothing`; anything else is
    echoed. What is given up is worth 0.5; of the task `shrug`, nothing is said. `stay`: the stream
    does not end after `done`. `text`: in a field of every task.
    """

    def __init__(
        self,
        *,
        name="game",
        version="1",
        has_score=True,
        has_episodes=True,
        text="",
        **limits,
    ):
        self.info = pb.Environment(
            name=name,
            version=version,
            has_score=has_score,
            has_episodes=has_episodes,
            observation_kinds=[pb.OBSERVATION_KIND_TEXT],
            limits=pb.Limits(**limits),
            splits=[pb.Split(name="train", num_tasks=NUM_TASKS)],
        )
        self.text = text
        self.open = 0
        self.most_open = 0
        self.begun = 0
        self.scoring = 0
        self.most_scoring = 0
        self.batches = []
        self.tried = collections.Counter()
        self.go_on = asyncio.Event()

    async def Describe(self, request, context):
        await self._obey("Describe", context)
        return pb.DescribeResponse(environments=[self.info])

    async def ListTasks(self, request, context):
        await self._obey("ListTasks", context)
        if request.page_token and not request.page_token.startswith("from-"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "page_token: not one of mine")
        first = int(request.page_token.removeprefix("from-") or 0)
        last = min(first + (request.page_size or PAGE), NUM_TASKS)
        return pb.ListTasksResponse(
            tasks=[
                pb.Task(
                    id=f"t{number}", split="train", fields={"text": self.text} if self.text else {}
                )
                for number in range(first, last)
            ],
            next_page_token=f"from-{last}" if last < NUM_TASKS else "",
        )

    async def GetTask(self, request, context):
        if request.task_id == "counts":
            counts = {"open": self.open, "begun": self.begun, "pid": os.getpid()}
            fields = {key: str(count) for key, count in counts.items()}
            return pb.GetTaskResponse(task=pb.Task(id="counts", fields=fields))
        await self._obey(request.task_id, context)
        if not request.task_id.startswith("t"):
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such task")
        return pb.GetTaskResponse(task=pb.Task(id=request.task_id, split="train"))

    async def Score(self, request, context):
        self.batches.append(len(request.items))
        self.scoring += 1
        self.most_scoring = max(self.most_scoring, self.scoring)
        try:
            scored = []
            for item in request.items:
                answer = item.messages[-1].content
                await self._obey(answer, context)
                if answer == "failure":
                    scored.append(pb.Scored(failure="cannot be scored"))
                else:
                    reward = float("nan") if answer == "nan" else float(len(answer))
                    scored.append(pb.Scored(reward=reward))
            return pb.ScoreResponse(scored=scored[:-1] if answer == "too few" else scored)
        finally:
            self.scoring -= 1

    async def Episode(self, request_iterator, context):
        limit = self.info.limits.max_concurrent_episodes
        if limit and self.open >= limit:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{limit} are under way")
        self.open += 1
        self.begun += 1
        self.most_open = max(self.most_open, self.open)
        try:
            start = (await anext(request_iterator)).start
            await self._obey(start.task_id, context)
            await context.write(seen(f"seed {start.seed}"))
            async for request in request_iterator:
                action = request.action.content
                await self._obey(action, context)
                if action == "leave":
                    return
                await context.write(outcome(action))
                if action == "leave later":
                    await self.go_on.wait()
                if action.startswith("leave"):
                    return
                if action == "done":
                    if start.task_id == "stay":
                        await asyncio.Event().wait()
                    return
            if start.task_id != "shrug":
                done = start.task_id != "goes on"
                await context.write(pb.EpisodeResponse(reward=0.5, done=done))
        finally:
            self.open -= 1

    async def _obey(self, word, context):
        self.tried[word] += 1
        what, _, code = word.partition(":")
        if what == "status" or (what == "once" and self.tried[word] == 1):
            await context.abort(grpc.StatusCode[code], f"told to be {code}")
        if what == "hang":
            await self.go_on.wait()


def seen(text):
    return pb.EpisodeResponse(observation=[pb.Message(role="user", content=text)])


def outcome(action):
    match action:
        case "done":
            return pb.EpisodeResponse(reward=1.0, done=True)
        case "nan":
            return pb.EpisodeResponse(reward=float("nan"), done=True)
        case "nothing":
            return pb.EpisodeResponse()
        case _:
            return seen(f"you said {action}")


def register(game):
    return lambda server: add_EnvironmentServiceServicer_to_server(game, server)


@contextlib.asynccontextmanager
async def served(game, *, address="127.0.0.1:0"):
    """`game` over gRPC, with its health; the block gets what `serving` gives, once it is ready."""
    async with serving(register(game), services=[SERVICE], address=address) as running:
        await running.ready()
        yield running


@contextlib.asynccontextmanager
async def served_plainly(game):
    """`game` over gRPC with nothing else, as a beginner may do it; the block gets the port."""
    server = grpc.aio.server()
    register(game)(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def main(options):
    game = Game(version=options.version, max_concurrent_episodes=options.max_concurrent_episodes)
    async with served(game, address=options.listen) as running:
        print(f"listening on 127.0.0.1:{running.port}", flush=True)
        await terminated()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", required=True)
    parser.add_argument("--version", default="1")
    parser.add_argument("--max-concurrent-episodes", type=int, default=0)
    asyncio.run(main(parser.parse_args()))
