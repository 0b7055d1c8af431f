"""The OpenAI endpoints over real HTTP and gRPC on a mesh of fakes, in a loop of its own thread."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette

from rollmesh.errors import NotFound
from rollmesh.tokenizer import load_tokenizer
from rollmesh.types import LoraConfig, PolicyRef
from services.gateway.openai.config import OpenAiConfig
from services.gateway.openai.ports import key_of
from services.gateway.openai.routes import routes
from tests.fakes.coordinator import Fakes, eventually, running_coordinator
from tests.fakes.mesh import BASE_MODEL
from tests.fakes.speakers import Speaker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator
    from pathlib import Path

    from starlette.requests import Request

    from rollmesh.client import Client

KEYS = {"key-p": "projects/p", "key-q": "projects/q"}
ADAPTER = "projects/p/adapters/a"
UNPUBLISHED = "projects/p/adapters/fresh"
FOREIGN = "projects/q/adapters/b"
TINKER = "tinker://run/sampler_weights/one"


@dataclass
class World:
    """One that runs. `call`: in its loop."""

    url: str
    speaker: Speaker
    fakes: Fakes
    client: Client
    loop: asyncio.AbstractEventLoop

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def now(self, do, *arguments) -> None:
        """A plain function there."""

        async def work() -> None:
            do(*arguments)

        self.call(work())

    async def until_serving(self, *, serving: bool) -> None:
        """Return once the coordinator knows that the sampler does, or does not."""

        async def known() -> bool:
            members = (await self.client.fleet.get()).members
            return all(each.serving == serving for each in members if each.role == "sampler")

        await eventually(known)


@contextlib.asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    """The address of `app` on a free port."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server._serve([listener]))
        try:
            while not server.started:
                await asyncio.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True


async def project_of(request: Request) -> str | None:
    return KEYS.get(key_of(request))


async def policy_of(project: str, path: str) -> tuple[str, PolicyRef]:
    if (project, path) != ("projects/p", TINKER):
        raise NotFound(f"model: there is no {path}", field="model", value=path)
    return BASE_MODEL, PolicyRef(adapter=ADAPTER, policy_version=0)


@contextlib.asynccontextmanager
async def _world(
    folder: Path, model: Path, config: OpenAiConfig, coordinator: dict[str, Any]
) -> AsyncIterator[World]:
    speaker = Speaker(load_tokenizer(str(model)))
    fakes = Fakes(samplers={"s:1": speaker})
    async with running_coordinator(folder, fakes, **coordinator) as running:
        await running.until_served()
        client = running.client
        for name in (ADAPTER, UNPUBLISHED, FOREIGN):
            await client.adapters.create(name, BASE_MODEL, LoraConfig(rank=4))
        await client.adapters.publish(ADAPTER)
        await client.adapters.publish(FOREIGN)
        mounted = routes(
            config,
            client,
            records=client.records,
            project_of=project_of,
            policy_of=policy_of,
            load_tokenizer=lambda name: {BASE_MODEL: speaker.tokenizer}[name],
        )
        async with served(Starlette(routes=mounted)) as url:
            yield World(url, speaker, fakes, client, asyncio.get_running_loop())


@contextlib.contextmanager
def openai_world(
    folder: Path, model: Path, *, coordinator: dict[str, Any] | None = None, **config: Any
) -> Iterator[World]:
    """One in another thread. `model`: the folder of its tokenizer; `config`: of the endpoints."""
    ready: list[World] = []
    up, end = threading.Event(), asyncio.Event()
    failed: list[BaseException] = []

    async def live() -> None:
        async with _world(folder, model, OpenAiConfig(**config), coordinator or {}) as world:
            ready.append(world)
            up.set()
            await end.wait()

    def run() -> None:
        try:
            asyncio.run(live())
        except BaseException as error:  # noqa: BLE001 - told to who waits
            failed.append(error)
        finally:
            up.set()

    thread = threading.Thread(target=run, name="openai-world")
    thread.start()
    up.wait(60)
    try:
        if failed:
            raise failed[0]
        (world,) = ready
        yield world
    finally:
        if ready:
            ready[0].loop.call_soon_threadsafe(end.set)
        thread.join(60)
    if failed:
        raise failed[0]
