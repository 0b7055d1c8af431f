"""What the code under test tells OpenTelemetry."""

from __future__ import annotations

import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


@pytest.fixture(scope="session")
def providers():
    """OpenTelemetry takes one provider of each kind for the life of a process."""
    exporter = InMemorySpanExporter()
    # Each collection tells what is new, so that tests do not see each other's.
    new = dict.fromkeys((Counter, Histogram), AggregationTemporality.DELTA)
    reader = InMemoryMetricReader(preferred_temporality=new)
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(tracers)
    metrics.set_meter_provider(MeterProvider(metric_readers=[reader]))
    return exporter, reader


@pytest.fixture
def spans(providers):
    """The spans that ended since the test began."""
    providers[0].clear()
    return providers[0].get_finished_spans


@pytest.fixture
def recorded(providers):
    """The metrics by name, with what was recorded since the test began or asked last."""

    def recorded():
        data = providers[1].get_metrics_data()
        return {
            metric.name: metric
            for resource in (data.resource_metrics if data else [])
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.data.data_points
        }

    recorded()
    return recorded
