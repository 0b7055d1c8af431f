"""Servers of an environment, as connections to them show them: no sockets, so that time is free."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from rollmesh import chat
from rollmesh.errors import NotFound, Unavailable, Unimplemented
from services.reward.environments.config import EnvironmentConfig
from services.reward.environments.ports import Connection
from services.reward.environments.remote import RemoteEnvironment
from tests.fakes.virtual_time import simulate

INFO = chat.EnvironmentInfo(
    name="game", version="1", splits=(chat.Split("train"),), has_score=True, has_episodes=True
)


class FakeServer:
    """One server: `state` is serving, draining, silent, refusing or gone.

    A call of Score says who it is by its answer's text, and takes until `release` is told that;
    `scoring` are those that are under way. Texts in `raises` raise that, in `fails` when released.
    """

    def __init__(self, *, tells_health=True, **changes):
        self.state = "serving"
        self.health_state = None  # of its health alone
        self.tells_health = tells_health
        self.info = replace(INFO, **changes)
        self.scoring = []
        self.begun = []
        self.raises = {}
        self.fails = {}
        self.num_polls = 0
        self.num_answers = 0
        self.closed = False
        self._released = {}

    async def check(self):
        await self._poll(self.health_state)
        if not self.tells_health:
            raise Unimplemented("no health here")
        return self.state != "draining"

    async def describe(self):
        if not self.tells_health:
            await self._poll()
        await self._reach()
        return [self.info]

    async def get_task(self, environment, task_id):
        await self._reach()
        if task_id != "t0":
            raise NotFound("no such task")
        return chat.Task(task_id)

    async def list_tasks(self, environment, split, *, page_size=0, page_token=""):
        await self._reach()
        return [chat.Task("t0", split)], ""

    async def score(self, environment, items):
        (item, *_) = items
        who = item.messages[-1].content
        self.begun.append(who)
        _raise(self.raises.get(who))
        self.scoring.append(who)
        try:
            await self._released.setdefault(who, asyncio.Event()).wait()
        finally:
            self.scoring.remove(who)
        _raise(self.fails.get(who))
        return [chat.Scored(1.0) for _ in items]

    @contextlib.asynccontextmanager
    async def episode(self, environment, task_id, *, seed=0):
        raise NotImplementedError
        yield

    def release(self, who):
        self._released.setdefault(who, asyncio.Event()).set()

    async def close(self):
        self.closed = True

    async def _poll(self, state=None):
        self.num_polls += 1
        await self._reach(state)

    async def _reach(self, state=None):
        match state or self.state:
            case "silent":
                await asyncio.Event().wait()
            case "gone":
                raise Unavailable("connection refused")


def _raise(error):
    if error is not None:
        raise type(error)(str(error))  # anew: what is raised grows a traceback each time


class World:
    """An environment whose replicas are `servers`, by place; `names`: where its addresses lead."""

    def __init__(self, *servers, names=None, **settings):
        places = [f"10.0.0.{number}:7" for number in range(1, len(servers) + 1)]
        self.servers = dict(zip(places, servers, strict=True))
        self.names = names or {place: [place] for place in places}
        values = {"name": "game", "addresses": list(self.names), **settings}
        self.environment = RemoteEnvironment(
            EnvironmentConfig.parse(values, source="test"), self.connect, self.resolve
        )

    def connect(self, place, authority):
        server = self.servers[place]
        return Connection(server, server, server.close)

    async def resolve(self, address):
        if not self.names[address]:
            raise Unavailable("the name leads nowhere")
        return self.names[address]

    @property
    def status(self):
        return self.environment.status()

    def score(self, *whos):
        """A task that scores answers of these texts."""
        items = [chat.Answered(chat.Task("t"), [chat.Message("assistant", who)]) for who in whos]
        return asyncio.ensure_future(self.environment.score(items))

    async def until(self, condition, *, every_s=0.01):
        """Seconds that it took."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        async with asyncio.timeout(100):
            while not condition():
                await asyncio.sleep(every_s)
        return loop.time() - begun

    async def serves(self, num=1):
        return await self.until(lambda: self.status.num_serving == num)

    def play(self, scenario):
        """`scenario` while the environment is watched, in virtual time."""

        async def run():
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self.environment.run())
                try:
                    await scenario()
                finally:
                    watching.cancel()

        simulate(run())


async def settled():
    """Everything that can happen without time passing has happened."""
    for _ in range(50):
        await asyncio.sleep(0)
