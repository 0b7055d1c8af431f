"""Results of training as the SDK reads them."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from rollmesh.api.tinker.v1 import tinker_pb2 as pb
from rollmesh.errors import InvalidRequest
from services.gateway.wire.tensors import batched

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from rollmesh.api.common.v1 import tensor_pb2

OUTPUT = "ArrayRecord"
SUBSTITUTE = "stable_reinforce_substitute"
"""1: the loss was this mesh's own in place of stable_reinforce."""
_MAX_RUNS = 256

REDUCTIONS = {
    "loss": "sum",
    "num_tokens": "sum",
    "ratio_max": "max",
    SUBSTITUTE: "max",
    "queued_s": "max",
    "run_s": "sum",
}
"""How the SDK puts a metric of several chunks together; of all others it takes the mean."""


def runs_of(columns: Sequence[int]) -> list[list[int]]:
    """`columns`, as many times each, in short. InvalidRequest: they change too often."""
    runs = [[len(list(same)), count] for count, same in itertools.groupby(columns)]
    if len(runs) > _MAX_RUNS:
        raise InvalidRequest(
            f"data: the number of target columns changes {len(runs)} times; {_MAX_RUNS} at most",
            field="data",
        )
    return runs


def forward_backward_output(
    logprobs: Iterable[tensor_pb2.Tensor],
    metrics: Mapping[str, float],
    runs: object,
) -> pb.ForwardBackwardOutput:
    """ForwardBackwardOutput; `runs` as of `runs_of`: of anything else all data were vectors."""
    arrays = [np.frombuffer(tensor.data, "<f4") for tensor in logprobs]
    checked = _checked(runs, [len(array) for array in arrays])
    return pb.ForwardBackwardOutput(
        loss_fn_output_type=OUTPUT,
        loss_fn_outputs=list(_records(arrays, checked)),
        metrics=named_metrics(metrics),
    )


def _checked(runs: object, lengths: list[int]) -> list[list[int]]:
    """`runs`, which come back from a client, if they fit arrays of these lengths."""
    fits = isinstance(runs, list) and bool(runs)
    start = 0
    for run in runs if isinstance(runs, list) else []:
        fits = fits and isinstance(run, list) and [type(each) for each in run] == [int, int]
        if not fits or run[0] < 1 or run[1] < 0 or run[0] * max(run[1], 1) > len(lengths):
            return [[len(lengths), 0]]
        for _ in range(run[0]):
            together = lengths[start : start + max(run[1], 1)]
            start += max(run[1], 1)
            fits = fits and len(set(together)) == 1
    return runs if fits and start == len(lengths) else [[len(lengths), 0]]  # type: ignore[return-value]


def _records(
    arrays: list[NDArray[np.float32]], runs: Sequence[Sequence[int]]
) -> Iterable[pb.ArrayRecord]:
    left = iter(arrays)
    for count, width in runs:
        data: list[NDArray[Any]] = [
            np.stack(list(itertools.islice(left, width)), axis=1) if width else next(left)
            for _ in range(count)
        ]
        yield pb.ArrayRecord(type_tag=OUTPUT, fields={"logprobs": batched(data)}, num_datums=count)


def named_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """By `name:reduction`, as the SDK needs them to put chunks together."""
    return {f"{name}:{REDUCTIONS.get(name, 'mean')}": value for name, value in metrics.items()}


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those that JSON has numbers for."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
