"""The data of forward_backward as those of the mesh.

Targets [N, K] are K data with the same tokens, one for each column: every loss is a plain sum, so
nothing is lost. `columns` tells which of the data belong together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rollmesh.api.common.v1 import training_pb2
from rollmesh.convert.tensors import tensor_to_pb
from rollmesh.errors import InvalidRequest, Unimplemented
from rollmesh.rpc.channel import MAX_MESSAGE_BYTES
from services.gateway.wire import tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from rollmesh.api.tinker.v1 import tinker_pb2 as pb
    from services.gateway.wire.losses import Loss

    Inputs = dict[str, NDArray[Any]]

_LEAST_BYTES = 8
"""Of a position of a datum: token and target."""


def data_of(
    request: pb.ForwardBackwardRequest, loss: Loss, *, max_columns: int
) -> tuple[list[training_pb2.Datum], list[int]]:
    """The data, and for each of the request's how many columns it had; 0: it was a vector.

    Raises:
        InvalidRequest: names datum and field.
        Unimplemented: something else than text.
    """
    if not request.data:
        raise InvalidRequest("data: empty; at least one datum is needed", field="data")
    data: list[training_pb2.Datum] = []
    columns: list[int] = []
    num_bytes = 0
    for index, datum in enumerate(request.data):
        path = f"data[{index}]"
        tokens = _tokens(datum, path)
        inputs = _inputs(datum, loss, path, max_columns)
        targets = inputs["target_tokens"]
        _check_shapes(inputs, len(tokens), path)
        if targets.ndim == 2 and loss.needed != {"target_tokens"}:
            raise InvalidRequest(
                f"{path}.target_tokens: {request.loss_fn} takes one target a position",
                field=f"{path}.target_tokens",
            )
        columns.append(targets.shape[1] if targets.ndim == 2 else 0)
        # Sparse targets are many times larger here than they came.
        num_bytes += targets.size * _LEAST_BYTES
        if num_bytes > MAX_MESSAGE_BYTES:
            raise InvalidRequest(
                f"data: with their target columns they take over {MAX_MESSAGE_BYTES} bytes",
                field="data",
                allowed=MAX_MESSAGE_BYTES,
            )
        for column in _columns(inputs):
            made = _datum(tokens, column, loss, path)
            if loss.sequences and datum.loss_fn_input_spans:
                samples = _samples(datum, len(tokens), path)
                made.sequence_ids.CopyFrom(tensor_to_pb(samples, "<i4"))
            data.append(made)
    return data, columns


def _tokens(datum: pb.Datum, path: str) -> NDArray[np.int32]:
    parts = []
    for chunk in datum.model_input:
        if chunk.WhichOneof("chunk") != "encoded_text":
            kind = chunk.WhichOneof("chunk") or "an empty chunk"
            raise Unimplemented(f"{path}.model_input: {kind}; only text is read here")
        parts.append(tensors.token_ids(chunk.encoded_text.tokens, field=f"{path}.model_input"))
    if not sum(map(len, parts)):
        raise InvalidRequest(f"{path}.model_input: it is empty", field=f"{path}.model_input")
    return np.concatenate(parts)


def _inputs(datum: pb.Datum, loss: Loss, path: str, max_columns: int) -> Inputs:
    path = f"{path}.loss_fn_inputs"
    given = set(datum.loss_fn_inputs)
    if missing := sorted(loss.needed - given):
        raise InvalidRequest(f"{path}: {', '.join(missing)} missing", field=path)
    if other := sorted(given - loss.needed - loss.optional):
        allowed = ", ".join(sorted(loss.needed | loss.optional))
        raise InvalidRequest(
            f"{path}: {other[0][:50]!r} is not one of the loss's inputs: {allowed}",
            field=path,
            value=other[0][:50],
            allowed=allowed,
        )
    return {
        name: tensors.decode(tensor, field=f"{path}.{name}", max_columns=max_columns)
        for name, tensor in sorted(datum.loss_fn_inputs.items())
    }


def _check_shapes(inputs: Inputs, num_tokens: int, path: str) -> None:
    targets = inputs["target_tokens"]
    if targets.dtype.kind != "i":
        field = f"{path}.loss_fn_inputs.target_tokens"
        raise InvalidRequest(f"{field}: {targets.dtype.name} is no type of tokens", field=field)
    for name, values in inputs.items():
        if values.shape != targets.shape or len(values) != num_tokens:
            field = f"{path}.loss_fn_inputs.{name}"
            raise InvalidRequest(
                f"{field}: shape {list(values.shape)} does not fit model_input's {num_tokens} "
                f"tokens and target_tokens' {list(targets.shape)}",
                field=field,
            )
    if targets.ndim == 2 and not targets.shape[1]:
        raise InvalidRequest(f"{path}: target_tokens has no columns", field=path)
    if targets.size and not (targets.min() >= 0 and targets.max() < 2**31):
        field = f"{path}.loss_fn_inputs.target_tokens"
        raise InvalidRequest(
            f"{field}: {targets.min()} … {targets.max()} are no tokens", field=field
        )


def _columns(inputs: Inputs) -> Iterator[Inputs]:
    targets = inputs["target_tokens"]
    if targets.ndim == 1:
        yield inputs
        return
    for column in range(targets.shape[1]):
        yield {name: values[:, column] for name, values in inputs.items()}


def _datum(tokens: NDArray[np.int32], inputs: Inputs, loss: Loss, path: str) -> training_pb2.Datum:
    datum = training_pb2.Datum(
        token_ids=tensor_to_pb(tokens, "<i4"),
        target_token_ids=tensor_to_pb(inputs["target_tokens"], "<i4"),
    )
    if "logprobs" in inputs:
        # Above 0 by rounding alone.
        sampling_logprobs = np.minimum(inputs["logprobs"].astype("<f4"), 0)
        datum.sampling_logprobs.CopyFrom(tensor_to_pb(sampling_logprobs))
        datum.advantages.CopyFrom(tensor_to_pb(inputs["advantages"].astype("<f4")))
    weights = _weights(inputs, loss, path)
    if weights is not None:
        datum.weights.CopyFrom(tensor_to_pb(weights))
    return datum


def _weights(inputs: Inputs, loss: Loss, path: str) -> NDArray[np.float32] | None:
    """None: 1 everywhere."""
    if "weights" in inputs:
        weights: NDArray[np.float32] = inputs["weights"].astype("<f4")
        return weights
    if "sequence_ratio_mask" in inputs:
        mask: NDArray[np.bool_] = inputs["sequence_ratio_mask"] != 0
        if (inputs["advantages"][~mask] != 0).any():
            field = f"{path}.loss_fn_inputs.sequence_ratio_mask"
            raise InvalidRequest(
                f"{field}: 0 at positions with an advantage; the ratio is that of what is trained",
                field=field,
            )
        return mask.astype("<f4")
    if loss.masks_prompts:
        counts: NDArray[np.bool_] = (inputs["logprobs"] != 0) | (inputs["advantages"] != 0)
        return None if counts.all() else counts.astype("<f4")
    return None


def _samples(datum: pb.Datum, num_tokens: int, path: str) -> NDArray[np.int32]:
    """Which sample each target is of, counted within the datum; -1: of none."""
    known: dict[str, int] = {}
    samples = np.full(num_tokens, -1, "<i4")
    end = 0
    for span in datum.loss_fn_input_spans:
        which = span.WhichOneof("span")
        told = span.sampled_tokens if which == "sampled_tokens" else span.prompt_tokens
        start, end = end, end + told.length
        if told.length < 0 or end > num_tokens:
            break
        if which == "sampled_tokens":
            samples[start:end] = known.setdefault(told.sequence_id, len(known))
    if end != num_tokens:
        field = f"{path}.loss_fn_input_spans"
        raise InvalidRequest(
            f"{field}: they do not cover the {num_tokens} targets exactly", field=field
        )
    return samples
