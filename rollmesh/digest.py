"""The canonical digest of an adapter's tensors: the identity of a policy version.

sha256 over the tensors in the order of their names (UTF-8 byte order); of each, in turn: name,
dtype and shape as one line of text, then the little-endian bytes. Whoever holds the same tensors,
in whatever file or memory, computes the same digest.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Buffer

TensorView = tuple[str, str, "Sequence[int]", "Buffer"]
"""Name, dtype (as safetensors spells it: "F32", "BF16", "F16"), shape, little-endian bytes."""


def tensors_digest(tensors: Iterable[TensorView]) -> str:
    """Canonical digest of `tensors`, given in any order: 64 lower-case hex digits."""
    sha = hashlib.sha256()
    for name, dtype, shape, data in sorted(tensors, key=lambda tensor: tensor[0].encode()):
        extents = ",".join(str(extent) for extent in shape)
        # A newline cannot occur in dtype or shape, and the name's length is said, so no two
        # different lists of tensors can run together into the same bytes.
        sha.update(f"{len(name.encode())}:{name} {dtype} [{extents}]\n".encode())
        sha.update(data)
    return sha.hexdigest()


def safetensors_digest(file: bytes | memoryview) -> str:
    """Canonical digest of the tensors in the bytes of a safetensors file.

    Raises:
        ValueError: the bytes are not a whole safetensors file.
    """
    view = memoryview(file)
    size = int.from_bytes(view[:8], "little")
    body = view[8 + size :]
    if len(view) < 8 or 8 + size > len(view):
        raise ValueError(f"not a safetensors file: {len(view)} bytes, header of {size}")
    header = json.loads(bytes(view[8 : 8 + size]))
    try:
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = [
            (name, entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
            for name, entry in header.items()
        ]
        digest = tensors_digest(tensors)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError("not a safetensors file: its header says something else") from error
    if end != len(body):
        raise ValueError("not a whole safetensors file: the tensors do not end where the file does")
    return digest
