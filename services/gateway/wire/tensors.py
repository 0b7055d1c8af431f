"""Arrays as the wire has them: dense, or the cells of a matrix that are not 0."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from rollmesh.api.tinker.v1 import tinker_pb2 as pb
from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MAX_CELLS = 2**23
"""Of a sparse array once it is dense: few bytes can ask for many."""
_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    pb.DATA_TYPE_INT64: np.dtype("<i8"),
    pb.DATA_TYPE_INT32: np.dtype("<i4"),
}


def decode(tensor: pb.Tensor, *, field: str, max_columns: int) -> NDArray[Any]:
    """The array [N] or [N, K]; cells that are not listed are 0.

    Raises:
        InvalidRequest: type, shape and bytes do not fit, or K is above `max_columns`.
    """
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise _wrong(field, f"dtype {tensor.dtype} is not one of float32, int64, int32")
    shape = tuple(tensor.shape)
    if min(shape, default=0) < 0 or len(shape) > 2:
        raise _wrong(field, f"shape {list(shape)} is not that of a vector or a matrix")
    if len(shape) == 2 and shape[1] > max_columns:
        raise _wrong(field, f"{shape[1]} columns; {max_columns} at most")
    if tensor.HasField("sparse_csr"):
        return _dense(tensor.sparse_csr, shape, dtype, field)
    values = _vector(tensor.dense, dtype, field)
    if shape and math.prod(shape) != len(values):
        raise _wrong(field, f"shape {list(shape)} does not fit {len(values)} values")
    return values.reshape(shape or (len(values),))


def _dense(
    csr: pb.SparseCsr, shape: tuple[int, ...], dtype: np.dtype[Any], field: str
) -> NDArray[Any]:
    if len(shape) != 2:
        raise _wrong(field, f"shape {list(shape)} of a sparse array is not that of a matrix")
    if math.prod(shape) > MAX_CELLS:
        raise _wrong(field, f"shape {list(shape)} has more than {MAX_CELLS} cells")
    values = _vector(csr.values, dtype, field)
    rows = _vector(csr.crow_indices, np.dtype("<i8"), field)
    columns = _vector(csr.col_indices, np.dtype("<i8"), field)
    # As many row pointers must have come as there are rows.
    if len(rows) != shape[0] + 1 or len(columns) != len(values):
        raise _wrong(field, f"shape {list(shape)} does not fit the indices that came")
    counts = np.diff(rows)
    if rows[0] != 0 or rows[-1] != len(values) or (counts < 0).any():
        raise _wrong(field, "crow_indices do not rise from 0 to the number of values")
    if len(columns) and not (columns.min() >= 0 and columns.max() < shape[1]):
        raise _wrong(field, f"col_indices are not in [0, {shape[1]})")
    dense = np.zeros(shape, dtype)
    dense[np.repeat(np.arange(shape[0]), counts), columns] = values
    return dense


def _vector(data: bytes, dtype: np.dtype[Any], field: str) -> NDArray[Any]:
    if len(data) % dtype.itemsize:
        raise _wrong(field, f"{len(data)} bytes are no whole number of {dtype.name}")
    return np.frombuffer(data, dtype)


def token_ids(data: bytes, *, field: str) -> NDArray[np.int32]:
    """The tokens in `data`, int32 [N]."""
    return _vector(data, np.dtype("<i4"), field)


def batched(arrays: Sequence[NDArray[Any]]) -> pb.BatchedTensor:
    """float32 arrays that differ in their first extent alone, one after the other."""
    ends = np.cumsum([0, *(array.size * 4 for array in arrays)], dtype="<i8")
    return pb.BatchedTensor(
        data=b"".join(np.ascontiguousarray(array, dtype="<f4").tobytes() for array in arrays),
        offsets=ends.tobytes(),
        dtype=pb.DATA_TYPE_FLOAT32,
        trailing_shape=arrays[0].shape[1:],
    )


def _wrong(field: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {problem}", field=field)
