"""Traces, metrics and structured logs: one set-up for every service, off unless configured.

Every name that the mesh emits is listed here. Without an OTLP endpoint OpenTelemetry's own no-op
providers stay in place and cost next to nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import logging
import sys
import time
from typing import TYPE_CHECKING, Annotated, Literal

from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from pydantic import AfterValidator, PositiveFloat

from rollmesh.config import Config, check_peer_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from opentelemetry.util.types import AttributeValue

SPANS = {
    "job.step": "One optimizer step of a job, from its first sample to its live policy; the root.",
    "job.group": "One group: sampling and scoring.",
    "job.evaluate": "One evaluation on held-out tasks.",
    "trainer.forward_backward": "Loss and gradients of one batch.",
    "trainer.optim_step": "One AdamW step.",
    "trainer.publish": "Making a version exportable.",
    "trainer.snapshot": "Writing an adapter's state to the blob store.",
    "trainer.restore": "Taking over an adapter from its snapshot.",
    "sampler.pull": "Fetching a version from its trainer, or from the blob store.",
    "sampler.load": "Loading a version into the engine.",
    "sampler.sample": "Drawing the completions of one request.",
    "reward.score": "Scoring one batch.",
    "environment.call": "One call of an environment, to its first answer.",
    "gateway.request": "One HTTP request.",
}
"""Spans of our own, besides one for each RPC on either side."""

METRICS = {
    "rollmesh.job.phase": ("histogram", "s", "Time that a phase of a step took, by `phase`."),
    "rollmesh.job.reward": ("histogram", "1", "Mean reward of a step."),
    "rollmesh.job.loss": ("histogram", "1", "Loss of a step."),
    "rollmesh.job.kl": ("histogram", "1", "Divergence of the policy from the sampler, of a step."),
    "rollmesh.job.tokens_per_s": ("histogram", "1", "Sampled tokens a second, of a step."),
    "rollmesh.job.staleness": (
        "histogram",
        "1",
        "Versions between sampling and training, largest of a step.",
    ),
    "rollmesh.job.logprob_gap": (
        "histogram",
        "1",
        "Between sampler and trainer in a token's log-probability, nats, largest of a step.",
    ),
    "rollmesh.scheduler.queued": ("gauge", "1", "Sample requests that wait in the coordinator."),
    "rollmesh.trainer.op": ("histogram", "s", "Time that a training op took, by `op`."),
    "rollmesh.trainer.tokens": ("counter", "1", "Tokens trained."),
    "rollmesh.sampler.tokens": ("counter", "1", "Tokens sampled."),
    "rollmesh.sampler.queued": (
        "gauge",
        "1",
        "Requests that wait in a sampler, by `what`: requests for the engine, pulls, loads.",
    ),
    "rollmesh.sampler.kv_reserved": (
        "gauge",
        "1",
        "Tokens of key-value memory that running requests may come to need.",
    ),
    "rollmesh.sampler.load": (
        "histogram",
        "s",
        "Time from asking for a version to its being live, by `part`.",
    ),
    "rollmesh.reward.score": (
        "histogram",
        "s",
        "Time that scoring a batch took, by `function`.",
    ),
    "rollmesh.environment.call": (
        "histogram",
        "s",
        "Time that a call of an environment took, by `environment`, `method` and `outcome`.",
    ),
    "rollmesh.environment.waiting": (
        "histogram",
        "s",
        "Time that a call waited for room at an environment, by `environment`.",
    ),
    "rollmesh.environment.episodes": ("gauge", "1", "Episodes under way, by `environment`."),
    "rollmesh.gateway.request": (
        "histogram",
        "s",
        "Time that an HTTP request took, held polls included, by `endpoint` and `status`.",
    ),
}
"""Metrics: kind, unit and meaning. No attribute may take a value for each job or adapter: a
collector keeps a series for every value that it has ever seen. What one job measured is on its
spans: `job.step` has every metric of the step as `rollmesh.metric.NAME`."""


def _check_collector(address: str) -> str:
    return check_peer_address(address) if address else ""


class TelemetryConfig(Config):
    """Where telemetry goes."""

    otlp_endpoint: Annotated[str, AfterValidator(_check_collector)] = ""
    """host:port of an OTLP/gRPC collector for traces and metrics. Empty: none are made."""
    metrics_interval_s: PositiveFloat = 10.0
    """Seconds between two exports of metrics."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe log record that is written to standard error, one JSON object a line."""


@contextlib.contextmanager
def telemetry(service: str, config: TelemetryConfig) -> Iterator[None]:
    """Set up logs, and traces and metrics where configured, for the life of the process."""
    _log_as_json(service, config.log_level)
    if not config.otlp_endpoint:
        yield
        return
    resource = Resource.create({"service.name": f"rollmesh-{service}"})
    spans = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(config.otlp_endpoint, insecure=True)
    spans.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(spans)
    reader = PeriodicExportingMetricReader(
        OTLPMetricExporter(config.otlp_endpoint, insecure=True),
        export_interval_millis=config.metrics_interval_s * 1000,
    )
    meters = MeterProvider(resource=resource, metric_readers=[reader])
    metrics.set_meter_provider(meters)
    try:
        yield
    finally:
        spans.shutdown()
        meters.shutdown()


@contextlib.contextmanager
def span(name: str, **attributes: AttributeValue) -> Iterator[trace.Span]:
    """A span of our own; `name` is one of SPANS."""
    assert name in SPANS, name  # noqa: S101 - an unlisted name is our own mistake
    tracer = trace.get_tracer("rollmesh")
    named = {f"rollmesh.{key}": value for key, value in attributes.items()}
    with tracer.start_as_current_span(name, attributes=named) as current:
        yield current


def annotate(name: str, values: Mapping[str, float]) -> None:
    """Put `values` on the current span, as `rollmesh.{name}.KEY`."""
    trace.get_current_span().set_attributes(
        {f"rollmesh.{name}.{key}": value for key, value in values.items()}
    )


def record(name: str, value: float, **attributes: AttributeValue) -> None:
    """Put one value into a metric, as its kind takes it; `name` is one of METRICS.

    A counter adds the values up, a gauge keeps the last, a histogram their distribution.
    """
    _recorder(name)(value, attributes)


@functools.cache
def _recorder(name: str) -> Callable[[float, Mapping[str, AttributeValue]], None]:
    """Made once: without a provider, OpenTelemetry keeps every meter and instrument asked for."""
    kind, unit, description = METRICS[name]
    meter = metrics.get_meter("rollmesh")
    match kind:
        case "counter":
            return meter.create_counter(name, unit, description).add
        case "gauge":
            return meter.create_gauge(name, unit, description).set
        case _:
            return meter.create_histogram(name, unit, description).record


@contextlib.contextmanager
def timed(name: str, **attributes: AttributeValue) -> Iterator[None]:
    """Record the seconds that the block takes; `name` is one of METRICS."""
    start = time.perf_counter()
    try:
        yield
    finally:
        record(name, time.perf_counter() - start, **attributes)


_log_fields: contextvars.ContextVar[dict[str, object]] = contextvars.ContextVar(
    "log_fields",
    default={},  # noqa: B039 - never changed in place
)


@contextlib.contextmanager
def log_fields(**fields: object) -> Iterator[None]:
    """Put `fields` (job, adapter, policy_version, …) into every log record of the block."""
    token = _log_fields.set({**_log_fields.get(), **fields})
    try:
        yield
    finally:
        _log_fields.reset(token)


class _JsonFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}",
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _ContextFilter(logging.Filter):
    """Takes the context when the record is made: a handler may run in another context."""

    def filter(self, record: logging.LogRecord) -> bool:
        fields = dict(_log_fields.get())
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            fields["trace_id"] = f"{context.trace_id:032x}"
        record.fields = fields
        return True


def _log_as_json(service: str, level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(service))
    handler.addFilter(_ContextFilter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
