"""A gateway over HTTP in this process, on a whole coordinator on a mesh of fakes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import httpx

from rollmesh.api.tinker.v1 import tinker_pb2
from rollmesh.client import Client
from services.gateway.app import app
from services.gateway.config import GatewayConfig
from services.gateway.gateway import gateway
from services.gateway.ports import Mesh
from services.gateway.server import serving
from tests.fakes.coordinator import Fakes, running_coordinator
from tests.fakes.mesh import BASE_MODEL, FakeSampler

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from tests.fakes.coordinator import Coordinator


class NotingSampler(FakeSampler):
    """Remembers which versions it was asked for; -1: the base model."""

    def __init__(self) -> None:
        super().__init__()
        self.versions: list[int] = []

    def sample(self, source, *arguments, **options):
        self.versions.append(-1 if source is None else source.policy_version)
        return super().sample(source, *arguments, **options)


PROTOBUF = {"content-type": "application/x-protobuf"}


def batch(model: str, seq: int, tokens=(1, 2, 3), loss: str = "cross_entropy", **changes: Any):
    """A body of forward_backward with one datum."""
    size = len(tokens)
    int64 = tinker_pb2.Tensor(
        dtype=tinker_pb2.DATA_TYPE_INT64,
        dense=b"".join(token.to_bytes(8, "little") for token in tokens),
        shape=[size],
    )
    datum = tinker_pb2.Datum(
        model_input=[
            tinker_pb2.Chunk(
                encoded_text=tinker_pb2.EncodedTextChunk(
                    tokens=b"".join(token.to_bytes(4, "little") for token in tokens)
                )
            )
        ],
        loss_fn_inputs={"target_tokens": int64},
    )
    request = tinker_pb2.ForwardBackwardRequest(
        model_id=model, seq_id=seq, data=[datum], loss_fn=loss, **changes
    )
    return request.SerializeToString()


class Caller:
    """A client of one gateway with one key."""

    def __init__(self, http: httpx.AsyncClient, url: str, key: str) -> None:
        self.url = url
        self.key = key
        self._http = http

    async def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Whatever is answered."""
        headers = {"x-api-key": self.key, **options.pop("headers", {})}
        return await self._http.request(
            method, f"{self.url}/api/v1/{path}", headers=headers, **options
        )

    async def post(self, path: str, body: Any) -> dict[str, Any]:
        """What a POST that works answers."""
        content = {"content": body, "headers": PROTOBUF} if isinstance(body, bytes) else {}
        response = await self.send("POST", path, **(content or {"json": body}))
        assert response.status_code == 200, response.text
        return response.json()

    async def get(self, path: str) -> dict[str, Any]:
        """What a GET that works answers."""
        response = await self.send("GET", path)
        assert response.status_code == 200, response.text
        return response.json()

    async def session(self) -> str:
        """A new session."""
        body = {"tags": [], "user_metadata": None, "sdk_version": "0", "type": "create_session"}
        return (await self.post("create_session", body))["session_id"]

    async def model(self, session: str | None = None, number: int = 0) -> str:
        """A new model, made."""
        session = session or await self.session()
        body = {"session_id": session, "model_seq_id": number, "base_model": BASE_MODEL}
        ticket = await self.post("create_model", {**body, "lora_config": {"rank": 4}})
        result = await self.result(ticket)
        assert result == {"model_id": f"{session}:train:{number}", "type": "create_model"}
        return result["model_id"]

    async def poll(self, ticket: dict[str, Any]) -> httpx.Response:
        """One poll for a result."""
        body = {"request_id": ticket["request_id"], "allow_metadata_only": True}
        return await self.send("POST", "retrieve_future", json=body)

    async def result(self, ticket: dict[str, Any]) -> Any:
        """The result: JSON, or the bytes of a message."""
        async with asyncio.timeout(30):
            while (response := await self.poll(ticket)).status_code == 408:
                pass
        assert response.status_code == 200, response.text
        if response.headers["content-type"] == "application/x-protobuf":
            return response.content
        return response.json()

    async def trained(self, ticket: dict[str, Any]) -> tinker_pb2.ForwardBackwardOutput:
        """The result of a forward_backward."""
        return tinker_pb2.ForwardBackwardOutput.FromString(await self.result(ticket))

    async def step(self, model: str, seq: int) -> dict[str, Any]:
        """A forward_backward at `seq` and a step after it, both done: the step's result."""
        await self.post("forward_backward", batch(model, seq))
        body = {"model_id": model, "seq_id": seq + 1, "adam_params": {"learning_rate": 0.1}}
        return await self.result(await self.post("optim_step", body))


@dataclass
class World:
    """A coordinator that runs, and gateways of it. `keys`: secrets, by project."""

    coordinator: Coordinator
    fakes: Fakes
    keys: dict[str, str]
    http: httpx.AsyncClient
    ending: asyncio.Event
    urls: list[str]

    def caller(self, project: str = "p", gateway: int = 0) -> Caller:
        """Whoever has the key of `project`."""
        return Caller(self.http, self.urls[gateway], self.keys[project])


@contextlib.asynccontextmanager
async def gateway_at(
    address: str,
    ending: asyncio.Event,
    clock: Callable[[], float] = time.time,
    **settings: Any,
) -> AsyncIterator[str]:
    """A gateway of the coordinator at `address`, by whose `clock` also leases are due: its URL."""
    config = GatewayConfig.parse(
        {"coordinator": address, "key_cache_s": 0.0, **settings}, source="test"
    )
    async with Client(address) as client:
        cores = gateway(config, Mesh.of(client), ending, clock=clock, monotonic=clock)
        application = app(cores)
        async with serving(application, "127.0.0.1:0", drain_s=1.0) as port:
            yield f"http://127.0.0.1:{port}"


@contextlib.asynccontextmanager
async def gateway_world(
    folder: Path,
    fakes: Fakes | None = None,
    *,
    num_gateways: int = 1,
    coordinator_settings: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> AsyncIterator[World]:
    """A coordinator with its store in `folder`, gateways, and keys of the projects p and q."""
    fakes = fakes or Fakes(samplers={"s:1": NotingSampler()})
    ending = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        coordinator = await stack.enter_async_context(
            running_coordinator(folder, fakes, **coordinator_settings)
        )
        await coordinator.until_served()
        keys = {
            project: (await coordinator.client.keys.create(f"projects/{project}"))[1]
            for project in ("p", "q")
        }
        http = await stack.enter_async_context(httpx.AsyncClient(timeout=60))
        address = f"127.0.0.1:{coordinator.port}"
        urls = [
            await stack.enter_async_context(gateway_at(address, ending, **settings))
            for _ in range(num_gateways)
        ]
        yield World(coordinator, fakes, keys, http, ending, urls)
