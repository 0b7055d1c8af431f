"""Jobs: specs, states, events."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, get_args

from google.protobuf import json_format
from pydantic import ValidationError

from rollmesh import job as jobs
from rollmesh.api.coordinator.v1 import job_pb2
from rollmesh.config import explain
from rollmesh.convert.values import plain, time_from_pb, time_to_pb
from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from google.protobuf.message import Message

_SPELLED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def spec_to_pb(spec: jobs.JobSpec) -> job_pb2.JobSpec:
    """JobSpec; only what was set is sent, so that defaults stay the server's.

    Raises:
        InvalidRequest: a number that does not fit its field.
    """
    values = spec.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    message = job_pb2.JobSpec()
    try:
        json_format.ParseDict(values, message)
    except (json_format.ParseError, OverflowError) as error:
        raise InvalidRequest(f"spec: {error}", field="spec") from None
    return message


def spec_from_pb(message: job_pb2.JobSpec) -> jobs.JobSpec:
    """JobSpec.

    Raises:
        InvalidRequest: a value out of range or missing; the message names each key.
    """
    values = plain(message, field="spec")
    for section in (
        "adapter",
        "algorithm",
        "sampling",
        "stop",
        "distillation",
        "curriculum",
        "environment",
    ):
        if section in values:
            values[section] = _numbers(values[section])
    try:
        return jobs.JobSpec.model_validate(values)
    except ValidationError as error:
        raise explain(error, jobs.JobSpec, source="spec") from None


def _numbers(value: Any) -> Any:
    """NaN and infinity, which JSON spells as text, as numbers again: the models refuse those."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    return _SPELLED.get(value, value) if isinstance(value, str) else value


def job_to_pb(job: jobs.Job) -> job_pb2.Job:
    """Job."""
    message = job_pb2.Job(
        name=job.name,
        spec=spec_to_pb(job.spec),
        state=state_to_pb(job.state),
        state_reason=job.state_reason,
        create_time=time_to_pb(job.create_time),
        update_time=time_to_pb(job.update_time),
        adapter=job.adapter,
        step=job.step,
        metrics=job.metrics,
        last_event=job.last_event,
        best_checkpoint=job.best_checkpoint,
        sweep=job.sweep,
        problems=job.problems,
    )
    if job.queue is not None:
        message.queue.CopyFrom(_queue_to_pb(job.queue))
    if job.best_evaluation is not None:
        message.best_evaluation.CopyFrom(_evaluation_to_pb(job.best_evaluation))
    if job.first_evaluation is not None:
        message.first_evaluation.CopyFrom(_evaluation_to_pb(job.first_evaluation))
    if job.last_evaluation is not None:
        message.last_evaluation.CopyFrom(_evaluation_to_pb(job.last_evaluation))
    return message


def job_from_pb(message: job_pb2.Job) -> jobs.Job:
    """Job."""
    state = state_from_pb(message.state)
    assert state is not None  # noqa: S101 - a stored job has a state
    return jobs.Job(
        name=message.name,
        spec=spec_from_pb(message.spec),
        state=state,
        state_reason=message.state_reason,
        create_time=time_from_pb(message.create_time),
        update_time=time_from_pb(message.update_time),
        adapter=message.adapter,
        step=message.step,
        metrics=dict(message.metrics),
        first_evaluation=_evaluation_from_pb(message, "first_evaluation"),
        last_evaluation=_evaluation_from_pb(message, "last_evaluation"),
        last_event=message.last_event,
        queue=_queue_from_pb(message.queue) if message.HasField("queue") else None,
        best_evaluation=_evaluation_from_pb(message, "best_evaluation"),
        best_checkpoint=message.best_checkpoint,
        sweep=message.sweep,
        problems=list(message.problems),
    )


def event_to_pb(event: jobs.JobEvent) -> job_pb2.JobEvent:
    """JobEvent."""
    message = job_pb2.JobEvent(number=event.number, time=time_to_pb(event.time))
    match event.event:
        case jobs.StateChanged() as changed:
            message.state_changed.CopyFrom(
                job_pb2.StateChanged(
                    to=state_to_pb(changed.to_state),
                    reason=changed.reason,
                    **{"from": state_to_pb(changed.from_state)},
                )
            )
        case jobs.StepCompleted() as step:
            message.step_completed.CopyFrom(
                job_pb2.StepCompleted(
                    step=step.step,
                    policy_version=step.policy_version,
                    metrics=step.metrics,
                    phases=step.phases,
                )
            )
        case jobs.EvaluationCompleted() as evaluation:
            message.evaluation_completed.CopyFrom(_evaluation_to_pb(evaluation))
        case jobs.Warned() as warning:
            message.warning.CopyFrom(
                job_pb2.Warning(reason=warning.reason, message=warning.message)
            )
    return message


def event_from_pb(message: job_pb2.JobEvent) -> jobs.JobEvent:
    """JobEvent."""
    happening: jobs.Happening
    match message.WhichOneof("event"):
        case "state_changed":
            to_state = state_from_pb(message.state_changed.to)
            assert to_state is not None  # noqa: S101 - a server never leaves it out
            happening = jobs.StateChanged(
                from_state=state_from_pb(getattr(message.state_changed, "from")),
                to_state=to_state,
                reason=message.state_changed.reason,
            )
        case "step_completed":
            happening = jobs.StepCompleted(
                step=message.step_completed.step,
                policy_version=message.step_completed.policy_version,
                metrics=dict(message.step_completed.metrics),
                phases=dict(message.step_completed.phases),
            )
        case "evaluation_completed":
            evaluation = _evaluation_from_pb(message, "evaluation_completed")
            assert evaluation is not None  # noqa: S101 - WhichOneof says it is there
            happening = evaluation
        case _:
            happening = jobs.Warned(reason=message.warning.reason, message=message.warning.message)
    return jobs.JobEvent(number=message.number, time=time_from_pb(message.time), event=happening)


def _queue_to_pb(queue: jobs.QueueStatus) -> job_pb2.QueueStatus:
    message = job_pb2.QueueStatus(position=queue.position, rule=queue.rule, reason=queue.reason)
    if queue.eta_low_s is not None:
        message.eta_low.FromNanoseconds(int(queue.eta_low_s * 1e9))
    if queue.eta_high_s is not None:
        message.eta_high.FromNanoseconds(int(queue.eta_high_s * 1e9))
    return message


def _queue_from_pb(message: job_pb2.QueueStatus) -> jobs.QueueStatus:
    return jobs.QueueStatus(
        position=message.position,
        rule=message.rule,
        reason=message.reason,
        eta_low_s=message.eta_low.ToNanoseconds() / 1e9 if message.HasField("eta_low") else None,
        eta_high_s=message.eta_high.ToNanoseconds() / 1e9 if message.HasField("eta_high") else None,
    )


def _evaluation_to_pb(evaluation: jobs.EvaluationCompleted) -> job_pb2.EvaluationCompleted:
    return job_pb2.EvaluationCompleted(
        step=evaluation.step,
        reward_mean=evaluation.reward_mean,
        num_tasks=evaluation.num_tasks,
        duration_s=evaluation.duration_s,
        set=evaluation.set,
    )


def _evaluation_from_pb(message: Message, name: str) -> jobs.EvaluationCompleted | None:
    if not message.HasField(name):
        return None
    evaluation: job_pb2.EvaluationCompleted = getattr(message, name)
    return jobs.EvaluationCompleted(
        step=evaluation.step,
        reward_mean=evaluation.reward_mean,
        num_tasks=evaluation.num_tasks,
        duration_s=evaluation.duration_s,
        set=evaluation.set,
    )


def state_to_pb(state: jobs.JobState | None) -> job_pb2.JobState.ValueType:
    """JobState; None: unspecified."""
    return job_pb2.JobState.Value(f"JOB_STATE_{state or 'UNSPECIFIED'}")


def state_from_pb(state: job_pb2.JobState.ValueType) -> jobs.JobState | None:
    """JobState; None: unspecified, or one that is not known here."""
    name = job_pb2.JobState.Name(state).removeprefix("JOB_STATE_")
    return next((known for known in get_args(jobs.JobState) if known == name), None)
