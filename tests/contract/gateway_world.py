"""A gateway over a whole coordinator on fakes, in a thread of its own, and tenants who use it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx

from rollmesh import types
from rollmesh.api.tinker.v1 import tinker_pb2 as pb
from services.gateway.app import app
from services.gateway.config import GatewayConfig
from services.gateway.gateway import gateway
from services.gateway.openai.mounted import openai_routes
from services.gateway.ports import Mesh
from services.gateway.server import serving
from tests.contract.gateway_bodies import PROTOBUF, Names, batch
from tests.fakes.coordinator import Fakes, running_coordinator
from tests.fakes.mesh import BASE_MODEL, FakeSampler, FakeTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.applications import Starlette

MAX_BODY_BYTES = 2**20
TOKENIZER = Path(__file__).resolve().parents[2] / "models" / "arith"
TIMES = {"queued_s", "run_s"}
MAX_POLLS = 200
"""Of 0.2 s each, for what takes milliseconds."""


class DutifulSampler(FakeSampler):
    """Draws what it is asked for, with all that comes with it: else it would be in quarantine."""

    async def sample(
        self, source, prompt_token_ids, num_completions, params, *, project, continuations=()
    ):
        prompt = None
        if params.prompt_logprobs is not None:
            rows = [params.prompt_logprobs] * len(prompt_token_ids)
            prompt = types.PromptLogprobs(
                tuple(-0.25 for _ in rows),
                tuple(tuple(range(k)) for k in rows),
                tuple((-1.0,) * k for k in rows),
            )
        for begun in continuations or [types.Continuation(n) for n in range(num_completions)]:
            left = min(2, params.max_tokens or 2) - len(begun.token_ids)
            num_top = params.top_logprobs
            top = [] if num_top is None else [num_top] * left
            yield types.CompletionChunk(
                begun.index,
                (3,) * left,
                (-0.5,) * left,
                (replace(self._span(source), num_tokens=left),) if left else (),
                "length",
                prompt,
                tuple(tuple(range(k)) for k in top),
                tuple((-1.0,) * k for k in top),
            )
            prompt = None


class World:
    """Where the gateway is, whose keys there are, and its application."""

    def __init__(self, url: str, keys: dict[str, str], application: Starlette) -> None:
        self.url = url
        self.keys = keys
        self.application = application

    def client(self, project: str) -> httpx.Client:
        """HTTP with a key of `project`."""
        return httpx.Client(
            base_url=self.url + "/api/v1/", headers={"X-API-Key": self.keys[project]}, timeout=60.0
        )


@contextlib.contextmanager
def running_world(folder: Path, *projects: str) -> Iterator[World]:
    """A gateway that serves until the block ends; each project has a key."""
    started: Future[World] = Future()
    ending = asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        fakes = Fakes({"t:1": FakeTrainer(max_adapters=4096)}, {"s:1": DutifulSampler()})
        async with running_coordinator(folder, fakes) as running:
            await running.until_served()
            client = running.client
            keys = {
                project: (await client.keys.create(f"projects/{project}"))[1]
                for project in projects
            }
            mesh = Mesh(
                client.futures, client.records, client.keys, client.adapters,
                client.checkpoints, client.sampling, client.fleet,
            )  # fmt: skip
            config = GatewayConfig(
                coordinator=f"127.0.0.1:{running.port}",
                max_body_bytes=MAX_BODY_BYTES,
                max_hold_s=0.2,
                base_models=[{"name": BASE_MODEL, "tokenizer": str(TOKENIZER)}],
            )
            stop = asyncio.Event()
            cores = gateway(config, mesh, stop)
            application = app(cores, openai_routes(config, cores, client))
            async with serving(application, "127.0.0.1:0") as port:
                started.set_result(World(f"http://127.0.0.1:{port}", keys, application))
                await ending.wait()
                stop.set()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)
        finally:
            loop.close()

    thread = threading.Thread(target=run, name="gateway")
    thread.start()
    try:
        yield started.result(60)
    finally:
        if not loop.is_closed():
            loop.call_soon_threadsafe(ending.set)
        thread.join(60)


class Tenant:
    """One who trains, saves and samples by the wire, as the SDK does."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.http.post(path, json=body)
        assert answer.status_code == 200, (path, answer.status_code, answer.text)
        return dict(answer.json())

    def result(self, ticket: dict[str, Any]) -> bytes:
        """What a request comes to, as it is on the wire."""
        for _ in range(MAX_POLLS):
            answer = self.http.post(
                "retrieve_future",
                json={"request_id": ticket["request_id"]},
                headers={"accept": PROTOBUF},
            )
            if answer.status_code != 408:
                assert answer.status_code == 200, answer.text
                return untimed(answer)
        raise AssertionError(f"{ticket} comes to nothing: {answer.text}")

    def work(self) -> tuple[list[bytes], Names]:
        """A run from its session to its samples: what came of each request, and its names."""
        session = self.post("create_session", {"sdk_version": "0.38.0"})["session_id"]
        model = f"{session}:train:0"
        create = {"session_id": session, "model_seq_id": 0, "base_model": BASE_MODEL}
        tickets = [self.post("create_model", {**create, "lora_config": {"rank": 4, "seed": 1}})]
        for step in range(2):
            backward = self.http.post(
                "forward_backward",
                content=batch(model, 2 * step + 1).SerializeToString(),
                headers={"content-type": PROTOBUF},
            )
            assert backward.status_code == 200, backward.text
            tickets.append(backward.json())
            place = {"model_id": model, "seq_id": 2 * step + 2}
            tickets.append(
                self.post("optim_step", {**place, "adam_params": {"learning_rate": 0.1}})
            )
        tickets.append(self.post("save_weights", {"model_id": model, "seq_id": 5, "path": "ck"}))
        for_sampler = {"model_id": model, "seq_id": 6, "path": "sk"}
        tickets.append(self.post("save_weights_for_sampler", for_sampler))
        results = [self.result(ticket) for ticket in tickets]
        path = f"tinker://{model}/weights/ck"
        sampling = {"session_id": session, "sampling_session_seq_id": 0}
        weights = f"tinker://{model}/sampler_weights/sk"
        sampler = self.post("create_sampling_session", {**sampling, "model_path": weights})
        sampler_id = sampler["sampling_session_id"]
        drawn = self.post(
            "asample",
            {
                "sampling_session_id": sampler_id, "seq_id": 0, "num_samples": 2,
                "prompt": {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]},
                "sampling_params": {"max_tokens": 4, "seed": 1},
            },
        )  # fmt: skip
        sampled = pb.SampleResponse.FromString(self.result(drawn))
        assert len(sampled.sequences) == 2
        results += [each.tokens for each in sampled.sequences]
        info = self.http.get(f"training_runs/{model}/checkpoints")
        assert info.status_code == 200, info.text
        results.append(
            b" ".join(each["checkpoint_id"].encode() for each in info.json()["checkpoints"])
        )
        told = [each.replace(session.encode(), b"SESSION") for each in results]
        url = self.http.get(f"training_runs/{model}/checkpoints/weights/ck/archive").headers
        return told, Names(
            session=session,
            model=model,
            sampler=sampler_id,
            path=path,
            external=weights,
            train_request=tickets[1]["request_id"],
            sample_request=drawn["request_id"],
            token=url["location"].split("/")[-2],
        )


def untimed(answer: httpx.Response) -> bytes:
    """A result without the seconds that it took, which are others each time."""
    if answer.headers["content-type"].startswith(PROTOBUF):
        if b"ArrayRecord" not in answer.content[:20]:
            return answer.content  # samples
        output = pb.ForwardBackwardOutput.FromString(answer.content)
        for name in list(output.metrics):
            if name.partition(":")[0] in TIMES:
                del output.metrics[name]
        return output.SerializeToString(deterministic=True)
    told = answer.json()
    metrics = told.get("metrics") or {}
    told["metrics"] = {name: value for name, value in metrics.items() if name not in TIMES}
    return json.dumps(told, sort_keys=True).encode()


class Neighbour:
    """Works on and on, and compares what comes of it with what came of it alone."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self.alone, self.names = Tenant(self._http).work()
        self.num_runs = 0
        self.error: BaseException | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="neighbour")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ending.set()
        self._thread.join()
        self._http.close()

    def _run(self) -> None:
        try:
            while not self._ending.is_set():
                told, _ = Tenant(self._http).work()
                assert told == self.alone
                self.num_runs += 1
        except BaseException as error:  # noqa: BLE001 - the test raises it
            self.error = error
