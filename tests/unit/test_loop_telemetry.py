"""One trace for each training step, from its first sample to its live policy."""

from __future__ import annotations

from collections import Counter

from opentelemetry import trace

from tests.fakes.job_mesh import Context, JobMesh, held_out, spec
from tests.fakes.virtual_time import simulate


class TracedMesh(JobMesh):
    """Stands for the clients, which make a span for each call."""

    def _call(self, name):
        with trace.get_tracer("test").start_as_current_span(name):
            return super()._call(name)


def test_everything_that_a_step_does_is_in_its_trace(spans):
    context = Context(spec(evaluation=held_out()))
    simulate(TracedMesh(context).run())
    by_trace = {}
    for span in spans():
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
    roots = Counter(span.name for span in spans() if span.parent is None)
    assert roots["job.step"] == 6
    assert roots["job.evaluate"] == 2


def test_every_step_is_measured(recorded):
    simulate(JobMesh(Context(spec())).run())
    metrics = recorded()
    for name in ("reward", "loss", "kl", "staleness", "tokens_per_s", "logprob_gap"):
        (point,) = metrics[f"rollmesh.job.{name}"].data.data_points
        assert point.count == 6
        # One series, however many jobs there are.
        assert not point.attributes
    phases = {
        point.attributes["phase"]: point.count
        for point in metrics["rollmesh.job.phase"].data.data_points
    }
    at_each_step = ("sample", "reward", "wait", "forward_backward", "optim_step", "step")
    # The fresh adapter goes live as well, before the first step.
    assert phases == {**dict.fromkeys(at_each_step, 6), "publish": 7, "load": 7}


def test_what_a_job_measured_is_on_the_span_of_its_step(spans):
    context = Context(spec())
    simulate(JobMesh(context).run())
    by_step = {
        span.attributes["rollmesh.step"]: span.attributes
        for span in spans()
        if span.name == "job.step"
    }
    for completed in context.steps:
        attributes = by_step[completed.step]
        assert attributes["rollmesh.job"] == context.name
        assert completed.metrics
        for name, value in completed.metrics.items():
            assert attributes[f"rollmesh.metric.{name}"] == value
