"""The same small request directly, over HTTP, and through the Tinker SDK, which take turns."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import TYPE_CHECKING

import httpx
import numpy as np
import tinker
from tinker import types
from tinker.proto import tinker_public_pb2

from rollmesh.api.common.v1 import training_pb2
from rollmesh.api.coordinator.v1 import future_service_pb2, training_service_pb2
from rollmesh.convert.tensors import tensor_to_pb
from services.gateway.wire.ids import ModelId

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rollmesh.client import Client

BASE_MODEL = "arith"
TOKENS = np.arange(8, 40)
WARM_UP = 10


async def overhead(
    client: Client, url: str, key: str, project: str, calls: int
) -> dict[str, float]:
    """gateway_overhead_ms and sdk_overhead_ms; the table has each way's times."""
    service = tinker.ServiceClient(base_url=url, api_key=key)
    models = [
        await asyncio.to_thread(
            lambda: service.create_lora_training_client(
                BASE_MODEL, rank=8, train_unembed=False
            ).result()
        )
        for _ in range(3)
    ]
    async with httpx.AsyncClient(base_url=url, headers={"X-API-Key": key}, timeout=60) as http:
        ways: dict[str, Callable[[int], Awaitable[None]]] = {
            "FutureService": _directly(client, project, ModelId.parse(models[0].model_id)),
            "HTTP": _over_http(http, models[1].model_id),
            "SDK": _through_sdk(models[2]),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(1, WARM_UP + calls + 1):
            for way, call in ways.items():
                start = time.perf_counter()
                await call(number)
                if number > WARM_UP:
                    seconds[way].append(time.perf_counter() - start)
    await asyncio.to_thread(lambda: service.close("success").result())
    medians = {way: 1000 * statistics.median(each) for way, each in seconds.items()}
    print(f"\nforward of {len(TOKENS)} tokens, {calls} times each way")  # noqa: T201
    for way, each in seconds.items():
        tenths = [1000 * tenth for tenth in statistics.quantiles(each, n=10)]
        print(f"  {way:<14} {medians[way]:7.2f} ms ({tenths[0]:.2f} to {tenths[-1]:.2f}: 80 %)")  # noqa: T201
    return {
        "gateway_overhead_ms": round(medians["HTTP"] - medians["FutureService"], 3),
        "sdk_overhead_ms": round(medians["SDK"] - medians["HTTP"], 3),
    }


def _directly(client: Client, project: str, model: ModelId) -> Callable[[int], Awaitable[None]]:
    """As the gateway asks, at the same places of the same kind of queue."""
    datum = training_pb2.Datum(
        token_ids=tensor_to_pb(TOKENS, "<i4"),
        target_token_ids=tensor_to_pb(TOKENS, "<i4"),
        weights=tensor_to_pb(np.ones(len(TOKENS)), "<f4"),
    )
    work = future_service_pb2.Work(
        forward=training_service_pb2.ForwardRequest(
            adapter=model.adapter(project),
            data=[datum],
            loss_config=training_pb2.LossConfig(loss=training_pb2.LOSS_CROSS_ENTROPY),
        )
    )

    async def call(number: int) -> None:
        name = f"{project}/futures/t-{model.queue}-{number}"
        await client.futures.create(name, work, queue=model.queue, position=number)
        future = await client.futures.wait(name)
        assert future.HasField("forward"), future  # noqa: S101 - else there is nothing to measure

    return call


def _over_http(http: httpx.AsyncClient, model_id: str) -> Callable[[int], Awaitable[None]]:
    """As the SDK asks, with nothing around it."""
    wire = tinker_public_pb2
    ones = np.ones(len(TOKENS), "<f4")
    datum = wire.Datum(
        model_input=[
            wire.Chunk(encoded_text=wire.EncodedTextChunk(tokens=TOKENS.astype("<i4").tobytes()))
        ],
        loss_fn_inputs={
            "target_tokens": wire.Tensor(
                dense=TOKENS.astype("<i8").tobytes(), dtype=wire.DTYPE_INT64, shape=[len(TOKENS)]
            ),
            "weights": wire.Tensor(
                dense=ones.tobytes(), dtype=wire.DTYPE_FLOAT32, shape=[len(TOKENS)]
            ),
        },
    )

    async def call(number: int) -> None:
        body = wire.ForwardBackwardRequest(
            model_id=model_id,
            seq_id=number,
            data=[datum],
            loss_fn="cross_entropy",
            forward_only=True,
        )
        taken = await http.post(
            "/api/v1/forward_backward",
            content=body.SerializeToString(),
            headers={"Content-Type": "application/x-protobuf"},
        )
        ticket = taken.raise_for_status().json()["request_id"]
        done = await http.post(
            "/api/v1/retrieve_future",
            json={"request_id": ticket, "allow_metadata_only": False},
            headers={"Accept": "application/x-protobuf"},
        )
        output = wire.ForwardBackwardOutput.FromString(done.raise_for_status().content)
        assert output.loss_fn_outputs, output  # noqa: S101 - else there is nothing to measure

    return call


def _through_sdk(training: tinker.TrainingClient) -> Callable[[int], Awaitable[None]]:
    data = [
        types.Datum(
            types.ModelInput.from_ints(TOKENS.tolist()),
            {"target_tokens": TOKENS, "weights": np.ones(len(TOKENS), np.float32)},
        )
    ]

    async def call(_: int) -> None:
        await training.forward(data, "cross_entropy")

    return call
