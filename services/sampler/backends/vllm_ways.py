"""How files of one kind become what a slot holds: where each tensor goes, and what scales it.

That follows from a file's header and its configuration, and is found once for all such files.
`flat`: all that a slot holds, one stack after the other, those of As before those of Bs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from services.sampler.backends.vllm_identity import bits_of, scaling_of, stacks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class Stored:
    """A file's tensors in the order of their bytes: all of one type, without a gap from `begin`."""

    begin: int
    dtype: torch.dtype
    names: list[str]
    shapes: list[list[int]]
    sizes: list[int]


@dataclass(frozen=True, slots=True)
class Piece:
    """What a stack of `shape` holds: of a file's tensors the one at `index`, and zeros around it.

    `index` None: nothing but zeros. `scaling` None: an A, or nothing.
    """

    shape: tuple[int, ...]
    index: int | None = None
    rows: int = 0
    columns: int = 0
    scaling: float | None = None

    @property
    def size(self) -> int:
        """Of what the stack holds."""
        return math.prod(self.shape)

    @property
    def fits(self) -> bool:
        """The stack has room for it."""
        return self.rows <= self.shape[-2] and self.columns <= self.shape[-1]


class Way:
    """From a file to a slot.

    Attributes:
        ranks: of each stack of As.
    """

    def __init__(
        self, stored: Stored, of_a: Sequence[Piece], of_b: Sequence[Piece], dtype: torch.dtype
    ) -> None:
        self._begin, self._type, self._sizes = stored.begin, stored.dtype, stored.sizes
        pieces = [*of_a, *of_b]
        self._pieces = [(piece, piece.size) for piece in pieces]
        self.ranks = [piece.rows for piece in of_a]
        self._dtype = dtype
        self._zeros = torch.zeros(max(piece.size for piece in pieces), dtype=dtype)
        ends = np.cumsum([piece.size for piece in pieces]).tolist()
        starts = [0, *ends[:-1]]
        # What lies side by side and has one scaling is multiplied at once.
        runs = groupby(zip(pieces, starts, ends, strict=True), lambda each: each[0].scaling)
        self._scalings = [
            (scaling, run[0][1], run[-1][2])
            for scaling, same in runs
            if scaling is not None and (run := list(same))
        ]
        # The first value of the last row of each A.
        self._last = [
            start + (piece.rows - 1) * piece.shape[-1]
            for piece, start in zip(of_a, starts, strict=False)
            if piece.rows
        ]

    def flat_of(self, file: NDArray[np.uint8]) -> torch.Tensor | None:
        """What a slot holds that has the file's tensors; None: not all is finite."""
        values = torch.frombuffer(file, dtype=self._type, offset=self._begin)
        tensors = torch.split(values.to(self._dtype), self._sizes)
        flat = torch.cat([self._placed(tensors, *piece) for piece in self._pieces])
        for scaling, start, end in self._scalings:
            flat[start:end] *= scaling
        # Infinities and NaN have every bit of the exponent: without the sign they are the largest.
        infinity = bits_of(torch.tensor(torch.inf, dtype=self._dtype))
        largest = (bits_of(flat) & np.iinfo(infinity.dtype).max).max()
        return flat if largest < infinity else None

    def _placed(self, tensors: Sequence[torch.Tensor], piece: Piece, size: int) -> torch.Tensor:
        if piece.index is None:
            return self._zeros[:size]
        tensor = tensors[piece.index]
        if tensor.numel() == size:
            return tensor
        placed = torch.zeros(piece.shape, dtype=self._dtype)
        placed[..., : piece.rows, : piece.columns] = tensor.view(piece.rows, piece.columns)
        return placed.view(-1)

    def full_rank(self, flat: torch.Tensor) -> bool:
        """Whether the last row of every A is known not to be zero."""
        return bool(bits_of(flat)[self._last].all())


def way_of(
    header: bytes,
    config: Mapping[str, Any],
    modules: Mapping[str, Any],
    packed: Mapping[str, Sequence[str]],
    dtype: torch.dtype,
    parse: Callable[[str], tuple[str, bool]],
) -> Way | None:
    """That of files with this header; `modules` and others as of `check_slot`.

    None: such a file does not become what a slot holds by copying whole tensors.
    """
    stored = stored_by(header)
    if stored is None:
        return None
    found: dict[tuple[str, bool], tuple[int, int, int, float | None]] = {}
    for index, (name, shape) in enumerate(zip(stored.names, stored.shapes, strict=True)):
        module, is_a = parse(name)
        rows, columns = shape
        scaling = None if is_a else scaling_of(config, name, columns)
        found[module, is_a] = index, rows, columns, scaling
    of_a: list[Piece] = []
    of_b: list[Piece] = []
    for pieces, is_a in ((of_a, True), (of_b, False)):
        for name, module in modules.items():
            stacks = stacks_of(module.lora_a_stacked if is_a else module.lora_b_stacked)
            parts = packed.get(name, [name])
            if len(parts) != len(stacks):
                parts = [""] * len(stacks)  # Of a kind that stays empty, or there is no way.
            for part, stack in zip(parts, stacks, strict=True):
                held = found.pop((part, is_a), ())
                pieces.append(Piece(tuple(stack.shape[1:]), *held))
    if found or not all(piece.fits for piece in of_a + of_b):
        return None
    return Way(stored, of_a, of_b, dtype)


def header_of(file: NDArray[np.uint8]) -> bytes:
    """That of a whole safetensors file."""
    size = int.from_bytes(file[:8].tobytes(), "little")
    return file[8 : 8 + size].tobytes()


def stored_by(header: bytes) -> Stored | None:
    """What a file with this header has; None: its bytes are not as in Stored."""
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    ordered = sorted(entries.items(), key=lambda entry: entry[1]["data_offsets"])
    types = {entry["dtype"] for _, entry in ordered}
    dtype = _TYPES.get(types.pop()) if len(types) == 1 else None
    begins, ends = zip(*(entry["data_offsets"] for _, entry in ordered), strict=True)
    begin = 8 + len(header)
    if dtype is None or begin % dtype.itemsize or begins != (0, *ends[:-1]):
        return None
    return Stored(
        begin,
        dtype,
        [name for name, _ in ordered],
        [entry["shape"] for _, entry in ordered],
        [(end - start) // dtype.itemsize for start, end in zip(begins, ends, strict=True)],
    )
