"""One trace for each training step, from its first sample to its live policy."""

from __future__ import annotations

from collections import Counter

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from rollmesh import telemetry
from tests.fakes.job_mesh import Context, JobMesh, held_out, spec
from tests.fakes.virtual_time import simulate


@pytest.fixture
def spans(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return exporter


class TracedMesh(JobMesh):
    """Stands for the clients, which make a span for each call."""

    def _call(self, name):
        with trace.get_tracer("test").start_as_current_span(name):
            return super()._call(name)


def test_everything_that_a_step_does_is_in_its_trace(spans):
    context = Context(spec(evaluation=held_out()))
    simulate(TracedMesh(context).run())
    by_trace = {}
    for span in spans.get_finished_spans():
        by_trace.setdefault(span.context.trace_id, []).append(span)
    steps = {
        span.attributes["rollmesh.step"]: Counter(inner.name for inner in inside)
        for inside in by_trace.values()
        for span in inside
        if span.name == "job.step"
    }
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]
    for inside in steps.values():
        assert inside == {
            "job.step": 1,
            "job.group": 3,
            "sample": 3,
            "score": 3,
            "forward_backward": 1,
            "optim_step": 1,
            "publish": 1,
            "load": 1,
        }
    roots = Counter(span.name for span in spans.get_finished_spans() if span.parent is None)
    assert roots["job.step"] == 6
    assert roots["job.evaluate"] == 2


def test_every_metric_of_the_loop_is_in_the_catalogue(monkeypatch):
    recorded = Counter()
    monkeypatch.setattr(telemetry, "record", lambda name, _, **__: recorded.update([name]))
    simulate(JobMesh(Context(spec())).run())
    assert set(recorded) <= set(telemetry.METRICS)
    assert recorded["rollmesh.job.reward"] == recorded["rollmesh.job.staleness"] == 6
    assert recorded["rollmesh.job.phase"] > 6 * 7
