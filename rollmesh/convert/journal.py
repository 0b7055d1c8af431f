"""Training ops and their results as the journal keeps them: the trainer's own messages, as bytes.

The sequence, the adapter and the epoch are left out: they are the journal's. Equal ops give equal
bytes, which is what its digests are of.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from rollmesh import types
from rollmesh.api.trainer.v1 import trainer_service_pb2 as pb
from rollmesh.convert.adapters import snapshot_from_pb, snapshot_to_pb
from rollmesh.convert.training import (
    adam_from_pb,
    adam_to_pb,
    arrays_from_pb,
    arrays_to_pb,
    data_from_pb,
    datum_to_pb,
    loss_from_pb,
    loss_to_pb,
)

OpKind: TypeAlias = Literal["forward_backward", "optim_step", "load_snapshot"]


def op_to_bytes(op: types.TrainingOp) -> tuple[OpKind, bytes]:
    """The kind of the op, and its body."""
    match op:
        case types.ForwardBackward():
            data = [datum_to_pb(datum) for datum in op.data]
            loss = loss_to_pb(op.loss_config)
            return "forward_backward", _bytes(
                pb.ForwardBackwardRequest(data=data, loss_config=loss)
            )
        case types.OptimStep():
            return "optim_step", _bytes(pb.OptimStepRequest(adam=adam_to_pb(op.adam)))
        case types.LoadSnapshot():
            return "load_snapshot", _bytes(
                pb.LoadSnapshotRequest(
                    snapshot=snapshot_to_pb(op.snapshot), with_optimizer=op.with_optimizer
                )
            )


def op_from_bytes(kind: OpKind, body: bytes) -> types.TrainingOp:
    """The op that `op_to_bytes` made `body` of."""
    match kind:
        case "forward_backward":
            batch = pb.ForwardBackwardRequest.FromString(body)
            return types.ForwardBackward(data_from_pb(batch.data), loss_from_pb(batch.loss_config))
        case "optim_step":
            return types.OptimStep(adam_from_pb(pb.OptimStepRequest.FromString(body).adam))
        case "load_snapshot":
            load = pb.LoadSnapshotRequest.FromString(body)
            return types.LoadSnapshot(snapshot_from_pb(load.snapshot), load.with_optimizer)


def result_to_bytes(result: types.TrainingResult) -> bytes:
    """An op's result."""
    match result:
        case types.ForwardBackwardResult():
            return pb.ForwardBackwardResponse(
                logprobs=arrays_to_pb(result.logprobs), metrics=result.metrics
            ).SerializeToString()
        case types.OptimStepResult():
            return pb.OptimStepResponse(
                policy_version=result.policy_version, metrics=result.metrics
            ).SerializeToString()
        case types.LoadResult():
            return pb.LoadSnapshotResponse(policy_version=result.policy_version).SerializeToString()


def result_from_bytes(kind: OpKind, body: bytes) -> types.TrainingResult:
    """The result that `result_to_bytes` made `body` of."""
    match kind:
        case "forward_backward":
            batch = pb.ForwardBackwardResponse.FromString(body)
            return types.ForwardBackwardResult(arrays_from_pb(batch.logprobs), dict(batch.metrics))
        case "optim_step":
            step = pb.OptimStepResponse.FromString(body)
            return types.OptimStepResult(step.policy_version, dict(step.metrics))
        case "load_snapshot":
            return types.LoadResult(pb.LoadSnapshotResponse.FromString(body).policy_version)


def _bytes(
    message: pb.ForwardBackwardRequest | pb.OptimStepRequest | pb.LoadSnapshotRequest,
) -> bytes:
    return message.SerializeToString(deterministic=True)
