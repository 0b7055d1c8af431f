"""The two ways in which an answer goes out: as one document, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from rollmesh.errors import MeshError
from services.gateway.openai.drawing import ClientGone, draw, while_connected
from services.gateway.openai.failures import refusal_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.types import Receive, Scope, Send

    from rollmesh.client import SamplingClient
    from rollmesh.types import CompletionChunk, PolicyRef, SamplingParams
    from services.gateway.openai.answers import Answer
    from services.gateway.openai.choice import Choice
    from services.gateway.openai.turns import Turns


@dataclass(frozen=True)
class Job:
    """All that it takes to draw one answer, and to keep it.

    `fields`: what the caller calls the fields of SampleRequest.
    """

    sampling: SamplingClient
    turns: Turns
    project: str
    policy: PolicyRef
    params: SamplingParams
    num_completions: int
    choices: list[Choice]
    answer: Answer
    fields: Mapping[str, str]

    async def draw(self, hear: Callable[[int, CompletionChunk], Awaitable[None]]) -> None:
        """Draw all choices."""
        prompts = [each.prompt_token_ids for each in self.choices[:: self.num_completions]]
        await draw(
            self.sampling,
            self.project,
            self.policy,
            prompts,
            self.num_completions,
            self.params,
            hear,
        )

    async def keep(self) -> dict[str, Any]:
        """Keep the turn; what the answer says of it."""
        turn = {
            **self.answer.turn(self.choices),
            "logprobs_kind": self.params.logprobs_kind,
        }
        problem = await self.turns.keep(self.project, turn)
        return {"turn_problem": problem} if problem else {}


async def whole(job: Job, receive: Receive) -> Response:
    """The answer, once all of it is there.

    Raises:
        ClientGone: nobody waits for it any more, and it is not drawn further.
        MeshError: of the mesh.
    """

    async def hear(index: int, chunk: CompletionChunk) -> None:
        job.choices[index].push(chunk)

    async def work() -> dict[str, Any]:
        await job.draw(hear)
        return {**job.answer.whole(job.choices), **await job.keep()}

    return JSONResponse(await while_connected(receive, work()))


class EventStream(Response):
    """An answer as it comes. The status waits for the first event: until then it can be refused."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, *, with_usage: bool) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._job = job
        self._with_usage = with_usage
        self._begun: set[int] = set()
        self._started = False
        self._turn = asyncio.Lock()  # Of several prompts, events come at once.

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Draw and send."""
        try:
            await while_connected(receive, self._run(send))
        except ClientGone:
            return
        except MeshError as error:
            refusal = refusal_of(error, self._job.fields)
            if not self._started:
                await refusal.response(scope, receive, send)
                return
            await self._send(send, refusal.body)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _run(self, send: Send) -> None:
        job = self._job
        null_usage = {"usage": None} if self._with_usage else {}

        async def hear(index: int, chunk: CompletionChunk) -> None:
            choice = job.choices[index]
            piece = choice.push(chunk)
            async with self._turn:
                first = index not in self._begun
                self._begun.add(index)
                event = job.answer.event(choice, piece, first=first)
                if event is not None:
                    await self._send(send, {**event, **null_usage})

        await job.draw(hear)
        kept = await job.keep()
        if self._with_usage or kept:
            await self._send(send, {**job.answer.usage_event(job.choices), **kept})
        await self._write(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, event: dict[str, Any]) -> None:
        text = json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        await self._write(send, text)

    async def _write(self, send: Send, data: str) -> None:
        if not self._started:
            self._started = True
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
        body = f"data: {data}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})
