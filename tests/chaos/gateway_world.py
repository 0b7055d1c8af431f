"""A mesh with two samplers and gateways, and a storm that kills some of them as two loops run."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import yaml
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rollmesh.client import Client
from services.gateway.server import serving as serving_http
from services.local.config import LocalConfig
from services.local.mesh import _reserved_port
from services.local.mesh import mesh as running_mesh
from services.local.probes import until_http_serves
from services.local.processes import processes
from tests.chaos.sdk_script import LOOPS, train

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.requests import Request

    from services.local.mesh import Mesh
    from tests.chaos.sdk_script import Trace

ROOT = Path(__file__).resolve().parents[2]
QUOTA = 2
"""Turns that a loop may take before and after a kill: none runs ahead while another recovers."""
_OF_THE_CONNECTION = {"content-length", "content-encoding", "transfer-encoding", "connection"}
ROUND_S = 240.0
"""In which a loop takes its turns after a kill; else it hangs."""


@contextlib.asynccontextmanager
async def gateway_mesh(folder: Path) -> AsyncIterator[Mesh]:
    """The mesh of examples/tinker/local.yaml with two samplers that are soon there."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "examples/tinker/local.yaml").read_text())
    (sampler,) = values["samplers"]
    sampler |= {"backend": "transformers", "max_rank": 8, "drain_s": 0.5}
    sampler.pop("kv_cache_memory")
    values["samplers"] = [sampler, sampler]
    values["gateway"] = {"drain_s": 0.5}
    config = LocalConfig.parse(values, source="examples/tinker/local.yaml")
    async with running_mesh(config, folder) as mesh:
        yield mesh


@contextlib.asynccontextmanager
async def more_gateways(
    mesh: Mesh, folder: Path, count: int
) -> AsyncIterator[dict[str, asyncio.subprocess.Process]]:
    """So many beside the mesh's own, by address."""
    config = yaml.safe_load((folder / "config" / "gateway.yaml").read_text())
    async with contextlib.AsyncExitStack() as stack:
        started = await stack.enter_async_context(processes())
        gateways = {}
        for number in range(count):
            address = f"127.0.0.1:{stack.enter_context(_reserved_port())}"
            path = folder / f"gateway-{number}.yaml"
            path.write_text(yaml.safe_dump({**config, "listen": address}))
            gateways[address] = await started.start(
                (sys.executable, "-m", "services.gateway", "--config", str(path)),
                log=folder / f"gateway-{number}.log",
                environment={"PYTHONPATH": str(ROOT)},
            )
            stack.push_async_callback(started.end, gateways[address], within_s=5.0)
        for address in gateways:
            await until_http_serves(address)
        yield gateways


class Turns:
    """A proxy that gives each request to the next of several gateways, never two in a row to one.

    Attributes:
        answered: how often each gateway answered, by address.
        taken: by request id, which gateway took the request.
        polled: by request id, which gateways were asked for its result.
    """

    def __init__(self, addresses: list[str]) -> None:
        self._next = itertools.cycle(addresses)
        self.answered: collections.Counter[str] = collections.Counter()
        self.taken: dict[str, str] = {}
        self.polled: dict[str, list[str]] = collections.defaultdict(list)

    async def until_answered(self, gateway: str) -> None:
        """Return once `gateway` has answered something."""
        while not self.answered[gateway]:
            await asyncio.sleep(0.05)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Its URL."""
        async with httpx.AsyncClient(timeout=60.0, limits=httpx.Limits()) as client:

            async def forward(request: Request) -> Response:
                gateway, body = next(self._next), await request.body()
                url = f"http://{gateway}{request.url.path}"
                polls = request.url.path.endswith("/retrieve_future")
                if polls:
                    self.polled[json.loads(body)["request_id"]].append(gateway)
                try:
                    given = await client.request(
                        request.method,
                        url,
                        params=request.query_params,
                        headers={k: v for k, v in request.headers.items() if k != "host"},
                        content=body,
                    )
                except httpx.TransportError as error:
                    return JSONResponse({"detail": str(error)}, status_code=503)
                self.answered[gateway] += 1
                if not polls and given.is_success and b'"request_id"' in given.content:
                    self.taken.setdefault(given.json()["request_id"], gateway)
                told = {k: v for k, v in given.headers.items() if k not in _OF_THE_CONNECTION}
                return Response(given.content, given.status_code, told)

            methods = ["GET", "POST", "PUT", "DELETE"]
            app = Starlette(routes=[Route("/{path:path}", forward, methods=methods)])
            async with serving_http(app, "127.0.0.1:0", drain_s=1.0) as port:
                yield f"http://127.0.0.1:{port}"


class Storm:
    """Lets loops take turns, and kills between and during them; `rng` says when and whom."""

    def __init__(self, kill: Callable[[str], Awaitable[None]], victims: list[str]) -> None:
        self._kill = kill
        self._victims = victims
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Condition()
        self._used = [0] * len(LOOPS)
        self._running = set(range(len(LOOPS)))
        self._over = False
        self.kills: list[str] = []

    def turn(self, number: int) -> None:
        """Return once loop `number` may go on; asked from its own thread."""
        asyncio.run_coroutine_threadsafe(self._turn(number), self._loop).result()

    async def finished(self, number: int) -> None:
        """Loop `number` has no more turns, whether it is done or has failed."""
        async with self._changed:
            self._running.discard(number)
            self._changed.notify_all()

    async def rage(self, rng: random.Random, kills: int) -> None:
        """Kill, wait until both loops go on, kill again; after that, nobody waits for a turn."""
        deck: list[str] = []
        try:
            for _ in range(kills):
                # As cards are drawn: in each deal everybody's turn comes.
                deck = deck or rng.sample(self._victims, len(self._victims))
                await self._until_used(rng.randint(0, QUOTA))
                await asyncio.sleep(rng.uniform(0, 0.4))  # anywhere in what runs now
                if not self._running:
                    break
                victim = deck.pop()
                await self._kill(victim)
                self.kills.append(victim)
                await self._until_used(QUOTA)
        finally:
            # Also where a loop has failed: the other one's thread must come to its end.
            async with self._changed:
                self._over = True
                self._changed.notify_all()

    async def _turn(self, number: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._over or self._used[number] < QUOTA)
            self._used[number] += 1
            self._changed.notify_all()

    async def _until_used(self, turns: int) -> None:
        """Return once each loop has begun so many turns since the last time."""
        async with asyncio.timeout(ROUND_S), self._changed:
            self._used = [0] * len(self._used)
            self._changed.notify_all()
            await self._changed.wait_for(
                lambda: all(self._used[each] >= turns for each in self._running)
            )


async def run_loops(
    mesh: Mesh,
    url: str,
    steps: int,
    *,
    storm: Storm | None = None,
    raging: Callable[[], Awaitable[None]] | None = None,
    at_once: bool = True,
) -> list[tuple[Trace, str]]:
    """What each loop was told, and the digest of its weights; else one after the other."""
    async with Client(mesh.address) as client:
        secrets = [(await client.keys.create(loop.project))[1] for loop in LOOPS]

        async def one(number: int) -> Trace:
            turn = (lambda: None) if storm is None else (lambda: storm.turn(number))
            try:
                return await asyncio.to_thread(
                    train, LOOPS[number], url, secrets[number], steps, turn
                )
            finally:
                if storm is not None:
                    await storm.finished(number)

        if at_once:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(one(number)) for number in range(len(LOOPS))]
                if raging is not None:
                    await raging()
            traces = [task.result() for task in running]
        else:
            traces = [await one(number) for number in range(len(LOOPS))]
        await mesh.serving()
        published = [await client.adapters.publish(trace.adapter) for trace in traces]
    return [(trace, each.digest) for trace, each in zip(traces, published, strict=True)]
