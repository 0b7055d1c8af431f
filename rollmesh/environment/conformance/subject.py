"""The environment under test, as a client sees it: raw messages, and a bound on every answer."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import grpc

from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.api.environment.v1.environment_service_pb2_grpc import EnvironmentServiceStub
from rollmesh.environment.conformance.rules import Broken, said

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from rollmesh.api.environment.v1.environment_service_pb2_grpc import (
        EnvironmentServiceAsyncStub,
    )

SERVICE = "rollmesh.api.environment.v1.EnvironmentService"
MAX_LISTED = 20_000
"""Tasks of a split that are looked at; the kit says so where there are more."""
_BEGINNING = 64
"""Episodes that begin at once, while many are opened."""


class Subject:
    """One environment of a server.

    Attributes:
        channel: to the server, without retries.
        stub: its service.
        name: the environment's.
        info: as Describe told it at first.
        answer_s: seconds in which every answer has to come.
        num_episodes: how many are opened at once where the environment allows it.
        pid: of its process, where that runs on this machine; None: not known.
        tasks: some of each split; there is one at least where rules need them.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        info: pb.Environment,
        *,
        answer_s: float,
        num_episodes: int,
        pid: int | None,
    ) -> None:
        self.channel = channel
        self.stub: EnvironmentServiceAsyncStub = EnvironmentServiceStub(channel)
        self.name = info.name
        self.info = info
        self.answer_s = max(answer_s, 3 * info.limits.max_answer_time.ToTimedelta().total_seconds())
        self.num_episodes = num_episodes
        self.pid = pid
        self.tasks: list[pb.Task] = []

    @property
    def room(self) -> int:
        """Episodes that may be opened at once here."""
        limit = self.info.limits.max_concurrent_episodes
        return min(limit, self.num_episodes) if limit > 0 else self.num_episodes

    async def listed(self, split: str, page_size: int = 0) -> list[pb.Task]:
        """All tasks of a split, at most MAX_LISTED, page by page."""
        tasks: list[pb.Task] = []
        token = ""
        while True:
            page = await self.stub.ListTasks(
                pb.ListTasksRequest(
                    environment=self.name, split=split, page_size=page_size, page_token=token
                ),
                timeout=self.answer_s,
            )
            if page_size and len(page.tasks) > page_size:
                raise Broken(f"a page of {split!r} has {len(page.tasks)} tasks, not {page_size}")
            if page.next_page_token and not page.tasks:
                raise Broken(f"a page of {split!r} has no tasks, yet there is said to be another")
            tasks.extend(page.tasks)
            token = page.next_page_token
            if not token or len(tasks) >= MAX_LISTED:
                return tasks

    async def score(self, items: list[pb.ScoreItem], *, patience: int = 1) -> list[pb.Scored]:
        """What Score says of a batch, in so many times the time for an answer."""
        request = pb.ScoreRequest(environment=self.name, items=items)
        response = await self.stub.Score(request, timeout=patience * self.answer_s)
        if len(response.scored) != len(items):
            raise Broken(f"{len(items)} items came back as {len(response.scored)} scores")
        return list(response.scored)

    @contextlib.asynccontextmanager
    async def stream(self, deadline_s: float | None = None) -> AsyncIterator[Stream]:
        """An episode's stream, which is cancelled when the block is left."""
        stream = Stream(self, deadline_s)
        try:
            yield stream
        finally:
            stream.cancel()

    async def open_many(self, count: int, deadline_s: float | None = None) -> list[Stream]:
        """`count` episodes that have begun; all are cancelled where one does not begin."""
        room = asyncio.Semaphore(_BEGINNING)
        streams = [Stream(self, deadline_s) for _ in range(count)]

        async def begin(place: int) -> None:
            async with room:
                await streams[place].begin(self.tasks[place % len(self.tasks)].id, seed=place)

        begun = await asyncio.gather(*map(begin, range(count)), return_exceptions=True)
        failures = [each for each in begun if isinstance(each, BaseException)]
        if failures:
            for stream in streams:
                stream.cancel()
            first = failures[0]
            hint = "; is there a bound on the streams of a connection?" if count > 1 else ""
            text = said(first) if isinstance(first, grpc.aio.AioRpcError) else f"{first}{hint}"
            raise Broken(
                f"of {count} episodes {len(failures)} did not begin beside the others: {text}"
            )
        return streams

    async def refused(self, call: Awaitable[Any], what: str, *allowed: grpc.StatusCode) -> None:
        """Make sure that `call` ends with a status of `allowed`."""
        names = " or ".join(code.name for code in allowed)
        try:
            await call
        except grpc.aio.AioRpcError as error:
            if error.code() not in allowed:
                raise Broken(f"{what} is refused {said(error)}, it is to be {names}") from None
        else:
            raise Broken(f"{what} is not refused, it is to be {names}")

    def raw(self, method: str, *, stream: bool) -> Callable[..., Any]:
        """A method of the service that takes bytes as they are."""
        make = self.channel.stream_stream if stream else self.channel.unary_unary
        return make(f"/{SERVICE}/{method}", request_serializer=None, response_deserializer=None)


class Stream:
    """One episode on the wire."""

    def __init__(self, subject: Subject, deadline_s: float | None) -> None:
        self._subject = subject
        self._call = subject.stub.Episode(timeout=deadline_s)

    async def begin(self, task_id: str, seed: int = 0) -> pb.EpisodeResponse:
        """Send `start`; the first response."""
        start = pb.Start(environment=self._subject.name, task_id=task_id, seed=seed)
        return await self._answered(pb.EpisodeRequest(start=start))

    async def act(self, action: pb.Message) -> pb.EpisodeResponse:
        """Send an action; its response."""
        return await self._answered(pb.EpisodeRequest(action=action))

    async def send(self, request: pb.EpisodeRequest) -> None:
        """Send anything. Where the stream has ended, reading tells why."""
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            await self._call.write(request)

    async def half_close(self) -> None:
        """Say that no more comes."""
        await self._call.done_writing()

    async def read(self, more_s: float = 0.0) -> pb.EpisodeResponse | None:
        """The next response, in the time for an answer and `more_s`; None: it has ended well.

        Raises:
            AioRpcError: it has ended otherwise.
            Broken: nothing came in time.
        """
        answer_s = self._subject.answer_s + more_s
        try:
            async with asyncio.timeout(answer_s):
                response = await self._call.read()
        except TimeoutError:
            raise Broken(f"nothing came within {answer_s:g} s") from None
        return response if isinstance(response, pb.EpisodeResponse) else None

    def cancel(self) -> None:
        """Break it off."""
        self._call.cancel()

    async def _answered(self, request: pb.EpisodeRequest) -> pb.EpisodeResponse:
        await self.send(request)
        response = await self.read()
        if response is None:
            raise Broken("the stream ended without an answer")
        return response
