"""One real mesh for all tests of this folder: processes, sockets, the vLLM engine, a real model."""

from __future__ import annotations

import threading
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
import pytest_asyncio
import yaml
from opentelemetry.proto.collector.metrics.v1 import (
    metrics_service_pb2,
    metrics_service_pb2_grpc,
)
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from rollmesh.client import Client
from rollmesh.job import JobSpec
from services.local.config import LocalConfig
from services.local.mesh import mesh as running_mesh

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from services.local.mesh import Mesh

ROOT = Path(__file__).resolve().parents[2]
MANY_ADAPTERS = 4096
"""The exercises of the Tinker SDK make hundreds of models, which stay for a day."""
WEIGHTS = {"one": 1, "two": 2, "four": 4}
"""Of projects that share the sampler; of all others it is 1."""


class Collector(
    trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer
):
    """An OTLP receiver that keeps what it is sent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[tuple[str, object]] = []
        self._metrics: set[str] = set()

    def Export(self, request, context):
        with self._lock:
            if isinstance(request, trace_service_pb2.ExportTraceServiceRequest):
                for resource in request.resource_spans:
                    attributes = resource.resource.attributes
                    names = {item.key: item.value.string_value for item in attributes}
                    for scope in resource.scope_spans:
                        self._spans += [(names["service.name"], span) for span in scope.spans]
                return trace_service_pb2.ExportTraceServiceResponse()
            for resource in request.resource_metrics:
                for scope in resource.scope_metrics:
                    self._metrics |= {metric.name for metric in scope.metrics}
            return metrics_service_pb2.ExportMetricsServiceResponse()

    @property
    def spans(self) -> list[tuple[str, object]]:
        with self._lock:
            return list(self._spans)

    @property
    def metrics(self) -> set[str]:
        with self._lock:
            return set(self._metrics)


@pytest.fixture(scope="session")
def collector() -> Iterator[tuple[Collector, str]]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    receiver = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield receiver, f"127.0.0.1:{port}"
    server.stop(0).wait()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def mesh(collector, tmp_path_factory) -> AsyncIterator[Mesh]:
    """The mesh of examples/local.yaml and a gateway, with telemetry sent to `collector`."""
    values = yaml.safe_load((ROOT / "examples" / "local.yaml").read_text())
    values["gateway"] = {}
    values["trainers"][0]["max_adapters"] = MANY_ADAPTERS
    telemetry = {"otlp_endpoint": collector[1], "metrics_interval_s": 1.0}
    services = (values["coordinator"], values["reward"], values["gateway"])
    sections = [*services, *values["trainers"], *values["samplers"]]
    for section in sections:
        section["telemetry"] = telemetry
    values["coordinator"]["projects"] = [
        {"id": project, "weight": weight} for project, weight in WEIGHTS.items()
    ]
    config = LocalConfig.parse(values, source="examples/local.yaml")
    async with running_mesh(config, tmp_path_factory.mktemp("mesh")) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def client(mesh) -> AsyncIterator[Client]:
    async with Client(mesh.address) as connected:
        yield connected


@pytest.fixture(scope="session")
def job_spec() -> Callable[..., JobSpec]:
    """The job of examples/jobs/arithmetic.yaml with other values: `algorithm={"group_size": 4}`."""
    values = yaml.safe_load((ROOT / "examples" / "jobs" / "arithmetic.yaml").read_text())

    def make(**changes: object) -> JobSpec:
        merged = dict(values)
        for key, change in changes.items():
            old = merged.get(key)
            merge = isinstance(old, dict) and isinstance(change, dict) and key != "dataset"
            merged[key] = {**old, **change} if merge else change
        return JobSpec.parse({k: v for k, v in merged.items() if v is not None}, source="test")

    return make
