"""Tensors to numpy arrays and back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from rollmesh.api.common.v1 import tensor_pb2
from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


_DTYPES: dict[tensor_pb2.DataType.ValueType, np.dtype[Any]] = {
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
    tensor_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
}
_KINDS = {f"<{known.kind}{known.itemsize}": kind for kind, known in _DTYPES.items()}


def tensor_to_pb(values: NDArray[Any] | Sequence[float], dtype: str = "<f4") -> tensor_pb2.Tensor:
    """`values` as a tensor of `dtype` ("<f4" or "<i4")."""
    array = np.ascontiguousarray(values, dtype=np.dtype(dtype))
    return tensor_pb2.Tensor(dtype=_KINDS[dtype], shape=array.shape, data=array.tobytes())


def tensor_from_pb(message: tensor_pb2.Tensor, *, field: str, dtype: str) -> NDArray[Any]:
    """A one-dimensional array of `dtype`; `field` names it in errors."""
    return _array(message, 1, field=field, dtype=dtype)


def matrix_from_pb(message: tensor_pb2.Tensor, *, field: str, dtype: str) -> NDArray[Any]:
    """A two-dimensional array of `dtype`; `field` names it in errors."""
    return _array(message, 2, field=field, dtype=dtype)


def _array(
    message: tensor_pb2.Tensor, num_dimensions: int, *, field: str, dtype: str
) -> NDArray[Any]:
    wanted = np.dtype(dtype)
    if _DTYPES.get(message.dtype) != wanted:
        # Not every number that arrives has a name.
        names = {number: name for name, number in tensor_pb2.DataType.items()}
        found = names.get(message.dtype, message.dtype)
        raise InvalidRequest(
            f"{field}.dtype: {found}, needed is {wanted.name}",
            field=f"{field}.dtype",
            value=found,
            allowed=wanted.name,
        )
    shape = tuple(message.shape)
    fits = min(shape, default=0) >= 0 and math.prod(shape) * wanted.itemsize == len(message.data)
    if len(shape) != num_dimensions or not fits:
        needed = "one dimension is" if num_dimensions == 1 else f"{num_dimensions} dimensions are"
        raise InvalidRequest(
            f"{field}: shape {list(shape)} of {wanted.name} does not fit {len(message.data)} "
            f"bytes; {needed} needed",
            field=field,
            value=list(shape),
        )
    return np.frombuffer(message.data, dtype=wanted).reshape(shape)


def floats_from_pb(message: tensor_pb2.Tensor, *, field: str = "logprobs") -> tuple[float, ...]:
    """The elements of a float32 vector."""
    if not message.data:
        return ()
    return tuple(tensor_from_pb(message, field=field, dtype="<f4").tolist())
