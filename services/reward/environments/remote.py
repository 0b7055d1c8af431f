"""An environment that others serve."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from rollmesh import chat
from rollmesh.errors import InvalidRequest, MeshError, NotFound, Unimplemented
from rollmesh.telemetry import record
from services.reward.environments.admission import Admission
from services.reward.environments.batches import cut_up
from services.reward.environments.calls import Calls
from services.reward.environments.episode import play
from services.reward.environments.failures import first_of_several
from services.reward.environments.replicas import Replicas
from services.reward.environments.run import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from services.reward.environments.config import EnvironmentConfig
    from services.reward.environments.ports import (
        Connect,
        EnvironmentPort,
        EpisodePort,
        Requests,
        Resolve,
        Tell,
    )

Held = contextlib.AsyncExitStack

_READING = (InvalidRequest, NotFound, Unimplemented)
_PLAYING = (NotFound, Unimplemented)


class RemoteEnvironment:
    """An environment by the name that jobs call it.

    Every method that calls it raises EnvironmentUnavailable, EnvironmentTimeout, EnvironmentFailed
    and Overloaded, and Unimplemented for what it does not offer.
    """

    def __init__(self, config: EnvironmentConfig, connect: Connect, resolve: Resolve) -> None:
        self.name = config.name
        self._config = config
        self._replicas = Replicas(config, connect, resolve)
        self._admission = Admission(config, self._replicas)
        self._calls = Calls(config, self._admission)

    async def run(self) -> None:
        """Watch its replicas until cancelled."""
        await self._replicas.run()

    def close(self, error: Callable[[], MeshError]) -> None:
        """Begin nothing more: `error` is what whoever waits or comes is told."""
        self._admission.close(error)

    def break_off(self, error: Callable[[], MeshError]) -> None:
        """End what is under way with `error`, made anew for each."""
        for replica in self._replicas:
            replica.room.break_off(error)

    def status(self) -> chat.EnvironmentStatus:
        """How it is now."""
        num_serving = len(self._replicas.working())
        return chat.EnvironmentStatus(
            name=self.name,
            serving=num_serving > 0,
            problem=self._replicas.problem(),
            num_replicas=len(self._replicas),
            num_serving=num_serving,
            num_running=sum(replica.room.num_running for replica in self._replicas),
            num_waiting=self._admission.num_waiting,
        )

    def describe(self) -> chat.EnvironmentInfo | None:
        """What it is when it is called through us; None: no replica takes work."""
        working, info = self._replicas.working(), self._replicas.agreed
        if not working or info is None:
            return None
        limits = replace(
            info.limits,
            max_concurrent_episodes=sum(replica.max_episodes for replica in working),
            max_score_batch=0,  # We cut batches up.
        )
        return replace(info, name=self.name, limits=limits)

    async def list_tasks(
        self, split: str, page_size: int, page_token: str
    ) -> tuple[list[chat.Task], str]:
        """Tasks of a split, and the token of the next page, as any replica says them.

        Raises:
            InvalidRequest: there is no such split; or the environment made no such token.
        """
        info = self._replicas.agreed
        if info is not None:
            self._check_split(split, info)

        async def ask(port: EnvironmentPort, _: Held) -> tuple[list[chat.Task], str]:
            return await port.list_tasks(
                self._config.called, split, page_size=page_size, page_token=page_token
            )

        with _measured(self.name, "ListTasks"):
            async with self._calls.under_way(
                Kind.READ, ask, self._config.answer_timeout_s, refusals=_READING
            ) as (_, page):
                return page

    async def get_task(self, task_id: str) -> chat.Task:
        """One task.

        Raises:
            NotFound: there is none with this id.
        """

        async def ask(port: EnvironmentPort, _: Held) -> chat.Task:
            return await port.get_task(self._config.called, task_id)

        with _measured(self.name, "GetTask"):
            async with self._calls.under_way(
                Kind.READ, ask, self._config.answer_timeout_s, refusals=_READING
            ) as (_, task):
                return task

    async def score(self, items: Sequence[chat.Answered]) -> list[chat.Scored]:
        """What answers are worth, in order; in as many calls at once as its batches need.

        Raises:
            NotFound: a task does not exist, and the environment takes no others.
            InvalidRequest: an item is larger than MAX_BATCH_BYTES.
        """
        with _measured(self.name, "Score"), first_of_several():
            info = await self._info()
            if not info.has_score:
                raise self._unimplemented("single turns")
            batches = cut_up(items, info.limits.max_score_batch, environment=self.name)
            # Only one of the calls waits for its place at a time, so that a batch, however large,
            # is one of those that wait.
            turn = asyncio.Lock()
            async with asyncio.TaskGroup() as tasks:
                parts = [tasks.create_task(self._score(batch, turn)) for batch in batches]
            return [scored for part in parts for scored in part.result()]

    async def play(self, start: chat.Start, requests: Requests, tell: Tell) -> None:
        """An episode: `tell` the first observation, then what comes of each of `requests`.

        Raises:
            NotFound: there is no such task.
            InvalidRequest: a second start, or a message that is not the assistant's.
        """

        async def begin(port: EnvironmentPort, held: Held) -> EpisodePort:
            return await held.enter_async_context(
                port.episode(self._config.called, start.task_id, seed=start.seed)
            )

        with _measured(self.name, "Episode"):
            if not (await self._info()).has_episodes:
                raise self._unimplemented("episodes")
            async with self._calls.under_way(
                Kind.EPISODE, begin, self._config.start_timeout_s, refusals=_PLAYING
            ) as (run, episode):
                self._count_episodes()
                try:
                    await play(run, episode, requests, tell, self._config.answer_timeout_s)
                finally:
                    self._count_episodes(-1)

    async def _score(self, items: Sequence[chat.Answered], turn: asyncio.Lock) -> list[chat.Scored]:
        async def ask(port: EnvironmentPort, _: Held) -> list[chat.Scored]:
            return await port.score(self._config.called, items)

        async with self._calls.under_way(
            Kind.SCORE, ask, self._config.answer_timeout_s, refusals=_PLAYING, turn=turn
        ) as (_, scored):
            return scored

    async def _info(self) -> chat.EnvironmentInfo:
        """What the environment is, once that is known."""
        while self._replicas.agreed is None:
            (await self._admission.enter(Kind.READ)).give_back()
        return self._replicas.agreed

    def _check_split(self, split: str, info: chat.EnvironmentInfo) -> None:
        splits = [each.name for each in info.splits]
        if split not in splits:
            allowed = ", ".join(splits)
            raise InvalidRequest(
                f"split: environment {self.name!r} has no {split[:63]!r}; it has {allowed}",
                field="split",
                value=split[:63],
                allowed=allowed,
            )

    def _unimplemented(self, what: str) -> Unimplemented:
        return Unimplemented(f"environment {self.name!r} has no {what}", environment=self.name)

    def _count_episodes(self, change: int = 0) -> None:
        num_episodes = sum(replica.room.num_episodes for replica in self._replicas)
        record("rollmesh.environment.episodes", num_episodes + change, environment=self.name)


@contextlib.contextmanager
def _measured(environment: str, method: str) -> Iterator[None]:
    """How long a call takes, and how it ends."""
    begun = time.perf_counter()
    outcome = "cancelled"
    try:
        yield
    except MeshError as error:
        outcome = error.reason.lower()
        raise
    else:
        outcome = "ok"
    finally:
        record(
            "rollmesh.environment.call",
            time.perf_counter() - begun,
            environment=environment,
            method=method,
            outcome=outcome,
        )
