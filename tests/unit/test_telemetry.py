"""Traces, metrics and logs: only names that are listed, joined across calls, one JSON a line."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import itertools
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from opentelemetry import metrics, trace
from opentelemetry.trace import StatusCode

from rollmesh.api.coordinator.v1 import job_service_pb2 as pb
from rollmesh.api.coordinator.v1.job_service_pb2_grpc import (
    JobServiceServicer,
    JobServiceStub,
    add_JobServiceServicer_to_server,
)
from rollmesh.errors import NotFound
from rollmesh.rpc.channel import channel
from rollmesh.rpc.server import serving
from rollmesh.rpc.status import mesh_errors
from rollmesh.telemetry import (
    METRICS,
    SPANS,
    TelemetryConfig,
    log_fields,
    record,
    span,
    telemetry,
    timed,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROOT = Path(__file__).parents[2]
SERVICE = "rollmesh.api.coordinator.v1.JobService"


# --- names ---------------------------------------------------------------------------------------


def emitted() -> list[tuple[str, str, str]]:
    """Where, by what, and what: each name that the code emits."""
    found = []
    for folder in ("rollmesh", "services"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Call(
                        func=ast.Name(id="span" | "timed" | "record" as by)
                        | ast.Attribute(
                            value=ast.Name(id="telemetry"), attr="span" | "timed" | "record" as by
                        ),
                        args=[ast.Constant(value=str(name)), *_],
                    ):
                        found.append((f"{path.relative_to(ROOT)}:{node.lineno}", by, name))
    return found


def test_every_name_that_is_emitted_is_listed():
    names = emitted()
    assert names
    for where, by, name in names:
        assert name in (SPANS if by == "span" else METRICS), f"{where}: {name}"


def test_a_name_that_is_not_listed_is_refused_where_it_is_used():
    with pytest.raises(AssertionError), span("job.stepp"):
        pass
    with pytest.raises(KeyError):
        record("rollmesh.job.rewards", 1.0)


def test_every_metric_has_a_unit_and_every_name_a_meaning():
    assert {unit for _, unit, _ in METRICS.values()} <= {"s", "1"}
    assert all(meaning.endswith(".") for _, _, meaning in METRICS.values())
    assert all(meaning.endswith(".") for meaning in SPANS.values())
    assert all(name.startswith("rollmesh.") for name in METRICS)


# --- spans ---------------------------------------------------------------------------------------


def test_spans_are_nested_as_the_blocks_are_and_named_attributes_are_ours(spans):
    with span("job.step", job="j"), span("job.group", index=3):
        pass
    group, step = spans()
    assert (group.name, step.name) == ("job.group", "job.step")
    assert group.parent.span_id == step.context.span_id
    assert step.parent is None
    assert dict(group.attributes) == {"rollmesh.index": 3}
    assert dict(step.attributes) == {"rollmesh.job": "j"}


def test_a_span_that_fails_says_so(spans):
    with pytest.raises(NotFound), span("job.step"):
        raise NotFound("gone")
    (step,) = spans()
    assert step.status.status_code is StatusCode.ERROR


class Jobs(JobServiceServicer):
    async def GetJob(self, request, context):
        with span("trainer.optim_step"):
            if not request.name:
                raise NotFound("gone")
        return pb.GetJobResponse()

    async def WatchJob(self, request, context):
        with span("sampler.sample"):
            yield pb.WatchJobResponse()


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[JobServiceStub]:
    """After the block every call is over on both sides, so that its spans have ended."""
    async with (
        serving(
            lambda server: add_JobServiceServicer_to_server(Jobs(), server),
            services=[SERVICE],
            drain_s=60,
        ) as running,
        channel(f"127.0.0.1:{running.port}") as opened,
    ):
        yield JobServiceStub(opened)


async def unary(stub):
    await stub.GetJob(pb.GetJobRequest(name="x"))


async def streamed(stub):
    async for _ in stub.WatchJob(pb.WatchJobRequest()):
        pass


@pytest.mark.parametrize(
    ("call", "method", "inner"),
    [(unary, "GetJob", "trainer.optim_step"), (streamed, "WatchJob", "sampler.sample")],
)
async def test_one_trace_leads_across_a_call(spans, call, method, inner):
    async with served() as stub:
        with span("job.step"):
            await call(stub)
    rpc = f"/{SERVICE}/{method}"
    found = {(ended.name, ended.kind.name): ended for ended in spans()}
    chain = [("job.step", "INTERNAL"), (rpc, "CLIENT"), (rpc, "SERVER"), (inner, "INTERNAL")]
    assert set(found) == set(chain)
    assert len({ended.context.trace_id for ended in found.values()}) == 1
    for outer, inside in itertools.pairwise(chain):
        assert found[inside].parent.span_id == found[outer].context.span_id, (outer, inside)


async def test_a_call_that_is_refused_is_marked_on_the_side_that_asked(spans):
    async with served() as stub:
        with pytest.raises(NotFound), mesh_errors():
            await stub.GetJob(pb.GetJobRequest())
    (asked,) = [ended for ended in spans() if ended.kind.name == "CLIENT"]
    assert asked.status.status_code is StatusCode.ERROR


# --- metrics -------------------------------------------------------------------------------------


def test_a_histogram_keeps_how_many_and_how_much_by_attribute(recorded):
    record("rollmesh.job.phase", 0.5, phase="sample")
    record("rollmesh.job.phase", 0.25, phase="sample")
    record("rollmesh.job.phase", 1.0, phase="load")
    phase = recorded()["rollmesh.job.phase"]
    assert phase.unit == "s"
    assert [(dict(p.attributes), p.count, p.sum) for p in phase.data.data_points] == [
        ({"phase": "sample"}, 2, 0.75),
        ({"phase": "load"}, 1, 1.0),
    ]


def test_a_counter_adds_up_and_never_falls(recorded):
    record("rollmesh.sampler.tokens", 3)
    record("rollmesh.sampler.tokens", 4)
    data = recorded()["rollmesh.sampler.tokens"].data
    assert data.is_monotonic
    assert [point.value for point in data.data_points] == [7]


def test_a_gauge_falls_back(recorded):
    record("rollmesh.scheduler.queued", 2)
    record("rollmesh.scheduler.queued", 0)
    data = recorded()["rollmesh.scheduler.queued"].data
    assert [point.value for point in data.data_points] == [0]


def test_a_block_is_timed_even_when_it_fails(recorded):
    with pytest.raises(NotFound), timed("rollmesh.reward.score", function="exact_match"):
        raise NotFound("gone")
    metric = recorded()["rollmesh.reward.score"]
    (point,) = metric.data.data_points
    assert (metric.unit, dict(point.attributes), point.count) == (
        "s",
        {"function": "exact_match"},
        1,
    )
    assert point.sum >= 0


# --- logs ----------------------------------------------------------------------------------------


@pytest.fixture
def lines(capsys):
    """Logs as the process writes them, from now on; pytest's own handlers are put back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # else they would be closed

    def lines():
        return [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    yield lines
    root.handlers[:] = handlers
    root.setLevel(level)


log = logging.getLogger("services.test")


def test_a_log_record_is_one_line_of_json(lines):
    with telemetry("trainer", TelemetryConfig()):
        log.info("step %d\nof many", 3)
    (line,) = lines()
    assert line.pop("time").startswith("20")
    assert line == {
        "level": "INFO",
        "service": "trainer",
        "logger": "services.test",
        "message": "step 3\nof many",
    }


def test_a_log_record_says_what_it_is_about(lines):
    with telemetry("trainer", TelemetryConfig()):
        with log_fields(job="j", policy_version=3), log_fields(adapter=Path("a")):
            log.warning("inside")
        log.warning("outside")
    inside, outside = lines()
    assert (inside["job"], inside["policy_version"], inside["adapter"]) == ("j", 3, "a")
    assert not {"job", "policy_version", "adapter"} & outside.keys()


async def test_tasks_do_not_mix_up_what_they_are_about(lines):
    async def work(job):
        with log_fields(job=job):
            await asyncio.sleep(0)
            log.info("%s", job)

    with telemetry("coordinator", TelemetryConfig()):
        await asyncio.gather(*(work(f"job {n}") for n in range(5)))
    assert all(line["job"] == line["message"] for line in lines())


def test_a_log_record_names_its_trace(lines, spans):
    with telemetry("trainer", TelemetryConfig()), span("job.step"):
        log.info("in a trace")
    (line,), (step,) = lines(), spans()
    assert line["trace_id"] == f"{step.context.trace_id:032x}"


def test_a_traceback_stays_on_the_line(lines):
    with telemetry("trainer", TelemetryConfig()):
        try:
            int("seven")
        except ValueError:
            log.exception("lost")
    (line,) = lines()
    assert line["message"] == "lost"
    assert 'int("seven")' in line["traceback"]


def test_records_below_the_level_are_not_written(lines):
    with telemetry("trainer", TelemetryConfig(log_level="WARNING")):
        log.info("quiet")
        log.warning("loud")
    assert [line["message"] for line in lines()] == ["loud"]


@pytest.mark.usefixtures("lines")
def test_without_a_collector_nothing_is_set_up():
    before = trace.get_tracer_provider(), metrics.get_meter_provider()
    with telemetry("trainer", TelemetryConfig()):
        assert (trace.get_tracer_provider(), metrics.get_meter_provider()) == before
