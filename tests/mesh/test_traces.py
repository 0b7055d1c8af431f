"""One training step is one trace, across all services."""

from __future__ import annotations

import asyncio

import pytest

from rollmesh.telemetry import METRICS, SPANS

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_step_is_one_trace_across_all_services(client, job_spec, collector):
    job = await client.jobs.create(
        "projects/test", job_spec(stop={"max_steps": 2}, evaluation=None)
    )
    async for _ in client.jobs.watch(job.name):
        pass

    receiver = collector[0]
    wanted = {
        ("rollmesh-coordinator", "job.step"),
        ("rollmesh-coordinator", "job.group"),
        ("rollmesh-sampler", "sampler.sample"),
        ("rollmesh-sampler", "sampler.pull"),
        ("rollmesh-sampler", "sampler.load"),
        ("rollmesh-reward", "reward.score"),
        ("rollmesh-trainer", "trainer.forward_backward"),
        ("rollmesh-trainer", "trainer.optim_step"),
        ("rollmesh-trainer", "trainer.publish"),
    }

    def step_traces() -> list[set[tuple[str, str]]]:
        spans = receiver.spans
        roots = {span.trace_id for _, span in spans if span.name == "job.step"}
        return [
            {(service, span.name) for service, span in spans if span.trace_id == root}
            for root in roots
        ]

    # This job is in no environment and came through no gateway.
    elsewhere = ("rollmesh.environment.", "rollmesh.gateway.")
    expected = {name for name in METRICS if not name.startswith(elsewhere)}
    # The exporters send in batches, on their own clocks.
    async with asyncio.timeout(60):
        while not any(wanted <= trace for trace in step_traces()):
            await asyncio.sleep(0.2)
        while not expected <= receiver.metrics:
            await asyncio.sleep(0.2)

    named = {span.name for _, span in receiver.spans if "." in span.name and "/" not in span.name}
    assert named <= SPANS.keys(), "a span that rollmesh/telemetry.py does not list"
    assert all(span.name != "job.step" or not span.parent_span_id for _, span in receiver.spans)
