"""Sweeps: what to try, and what came of it."""

from __future__ import annotations

from typing import Any, get_args

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Value
from pydantic import ValidationError

from rollmesh import sweep as sweeps
from rollmesh.api.coordinator.v1 import sweep_service_pb2 as pb
from rollmesh.config import explain
from rollmesh.convert.jobs import spec_from_pb, spec_to_pb, state_from_pb, state_to_pb
from rollmesh.convert.values import (
    optional,
    plain,
    struct_from_pb,
    struct_to_pb,
    time_from_pb,
    time_to_pb,
)
from rollmesh.errors import InvalidRequest


def sweep_spec_to_pb(spec: sweeps.SweepSpec) -> pb.SweepSpec:
    """SweepSpec; only what was set is sent.

    Raises:
        InvalidRequest: a number that does not fit its field.
    """
    message = pb.SweepSpec(
        base=spec_to_pb(spec.base),
        grid=[
            pb.SweepParameter(
                path=parameter.path,
                values=[json_format.ParseDict(value, Value()) for value in parameter.values],
            )
            for parameter in spec.grid
        ],
        points=[struct_to_pb(point) for point in spec.points],
    )
    if spec.halving is not None:
        values = spec.halving.model_dump(mode="json", exclude_unset=True)
        try:
            json_format.ParseDict(values, message.halving)
        except json_format.ParseError as error:
            raise InvalidRequest(f"halving: {error}", field="halving") from None
    return message


def sweep_spec_from_pb(message: pb.SweepSpec) -> sweeps.SweepSpec:
    """SweepSpec.

    Raises:
        InvalidRequest: a value out of range or missing; the message names each key.
    """
    base = spec_from_pb(message.base)
    rest = pb.SweepSpec(grid=message.grid, points=message.points)
    values: dict[str, Any] = {**plain(rest, field="spec"), "base": base}
    if message.HasField("halving"):
        values["halving"] = plain(message.halving, field="halving")
        if not message.halving.first_step:
            # Left out, as a message has it: the model says so.
            values["halving"]["first_step"] = 0
        if not message.halving.metric:
            values["halving"].pop("metric", None)
    try:
        return sweeps.SweepSpec.model_validate(values)
    except ValidationError as error:
        raise explain(error, sweeps.SweepSpec, source="spec") from None


def sweep_to_pb(sweep: sweeps.Sweep) -> pb.Sweep:
    """Sweep."""
    return pb.Sweep(
        name=sweep.name,
        spec=sweep_spec_to_pb(sweep.spec),
        state=pb.SweepState.Value(f"SWEEP_STATE_{sweep.state}"),
        create_time=time_to_pb(sweep.create_time),
        jobs=[
            pb.SweepJob(
                job=job.job,
                values=struct_to_pb(job.values),
                state=state_to_pb(job.state),
                state_reason=job.state_reason,
                step=job.step,
                metric=job.metric,
                rung=job.rung,
                halved=job.halved,
            )
            for job in sweep.jobs
        ],
    )


def sweep_from_pb(message: pb.Sweep) -> sweeps.Sweep:
    """Sweep."""
    name = pb.SweepState.Name(message.state).removeprefix("SWEEP_STATE_")
    state = next(known for known in get_args(sweeps.SweepState) if known == name)
    return sweeps.Sweep(
        name=message.name,
        spec=sweep_spec_from_pb(message.spec),
        state=state,
        create_time=time_from_pb(message.create_time),
        jobs=[_job_from_pb(job) for job in message.jobs],
    )


def _job_from_pb(message: pb.SweepJob) -> sweeps.SweepJob:
    state = state_from_pb(message.state)
    assert state is not None  # noqa: S101 - a stored job has a state
    return sweeps.SweepJob(
        job=message.job,
        values=struct_from_pb(message.values),
        state=state,
        state_reason=message.state_reason,
        step=message.step,
        metric=optional(message, "metric"),
        rung=message.rung,
        halved=message.halved,
    )
